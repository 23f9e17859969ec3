// E8M0 scales: a power of two for each block of 32, in one byte.
#pragma once

#include "scale.h"

namespace streamq {

// `emax`: floor(log2()) of the largest element, 8 for e4m3 and 2 for e2m1 (OCP MX specification 1.0).
template <int32_t emax>
class MxScale {
public:
    using Out = uint8_t;

    __aicore__ inline void Init(TPipe& pipe, ScaleArgs, uint32_t n)
    {
        pipe.InitBuffer(field_, n * sizeof(int32_t));
    }

    // `top` f32 [n], amax, becomes 2^(byte - 127), and `out` the byte. All of it by the bits: the
    // exponent of amax, one more from 1.75 on, less that of the largest element.
    __aicore__ inline void Make(LocalTensor<float> top, LocalTensor<uint8_t> out, uint32_t n)
    {
        LocalTensor<int32_t> bits = top.ReinterpretCast<int32_t>(), field = field_.Get<int32_t>();
        Adds(field, bits, 0x200000, n);
        Then();
        ShiftRight(field, field, 23, n);
        Then();
        Adds(field, field, -emax, n);
        Then();
        Maxs(field, field, 0, n);
        Then();
        ShiftLeft(bits, field, 23, n);
        Then();
        Maxs(bits, bits, 0x400000, n);  // byte 0 stands for 2^-127, a subnormal
        Cast(out, field, RoundMode::CAST_NONE, n);
        Then();
    }

private:
    TBuf<TPosition::VECCALC> field_;
};

}  // namespace streamq
