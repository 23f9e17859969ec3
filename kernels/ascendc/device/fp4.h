// FP4 e2m1 codes, one a byte: the index of the value, the sign in bit 3.
#pragma once

#include "scale.h"

namespace streamq {

// By comparing, in integers: dav-3510 casts to e2m1 from bf16 only, and f32 to bf16 to e2m1 would be
// rounded twice.
class E2m1Codes {
public:
    using Out = uint8_t;

    __aicore__ inline void Init(TPipe& pipe, uint32_t, int32_t, int32_t)
    {
        pipe.InitBuffer(magnitude_, TILE * sizeof(int32_t));
        pipe.InitBuffer(code_, TILE * sizeof(int32_t));
        pipe.InitBuffer(step_, TILE * sizeof(int32_t));
    }

    // `out` from the quotients `q` f32 [n], which are used up.
    __aicore__ inline void Make(LocalTensor<uint8_t> out, LocalTensor<float> q, uint32_t n)
    {
        LocalTensor<int32_t> magnitude = magnitude_.Get<int32_t>(), code = code_.Get<int32_t>();
        LocalTensor<int32_t> step = step_.Get<int32_t>(), sign = q.ReinterpretCast<int32_t>();
        Abs(magnitude.ReinterpretCast<float>(), q, n);
        Then();
        // The bits of 0.25, 0.75, 1.25, 1.75, 2.5, 3.5 and 5, the middles between two values. At a
        // tie the even index wins: the next number up is the first that goes on to an odd one.
        constexpr int32_t first[] = {0x3E800001, 0x3F400000, 0x3FA00001, 0x3FE00000,
                                     0x40200001, 0x40600000, 0x40A00001};
        // A negative number has the sign of its code even where that is 0; zeros have none.
        ShiftRight(sign, sign, 31, n);
        AtLeast(code, magnitude, 1, n);
        Mul(code, code, sign, n);
        Then();
        Muls(code, code, -8, n);
        Then();
        for (int32_t i = 0; i < 7; ++i) {
            AtLeast(step, magnitude, first[i], n);
            Add(code, code, step, n);
            Then();
        }
        Cast(out, code, RoundMode::CAST_NONE, n);
        Then();
    }

private:
    // 1 where `x` is `bound` or more, else 0; both are positive.
    __aicore__ inline void AtLeast(LocalTensor<int32_t> y, LocalTensor<int32_t> x, int32_t bound, uint32_t n)
    {
        Adds(y, x, 1 - bound, n);
        Then();
        Maxs(y, y, 0, n);
        Then();
        Mins(y, y, 1, n);
        Then();
    }

    TBuf<TPosition::VECCALC> magnitude_, code_, step_;
};

}  // namespace streamq
