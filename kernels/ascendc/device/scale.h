// Scales from largest magnitudes, in place: rounded to what they are stored in, never 0.
#pragma once

#include "tile.h"

namespace streamq {

struct ScaleArgs {
    float levels;        // the code that the largest magnitude lands on
    uint32_t stored;     // BF16, F16 or F32: the dtype that it is rounded to
    uint32_t quotient;   // what a quotient is rounded to before its code
    int32_t substitute;  // instead of a scale of 0: the bits of a positive f32
};

// x [n] is rounded to bf16 or f16 and comes back as f32. `narrow`: room for n elements of 2 bytes.
__aicore__ inline void RoundTo(LocalTensor<float> x, LocalTensor<int16_t> narrow, uint32_t dtype, uint32_t n)
{
    if (dtype == BF16) {
        LocalTensor<bfloat16_t> y = narrow.ReinterpretCast<bfloat16_t>();
        Cast(y, x, RoundMode::CAST_RINT, n);
        Then();
        Cast(x, y, RoundMode::CAST_NONE, n);
        Then();
    } else if (dtype == F16) {
        LocalTensor<half> y = narrow.ReinterpretCast<half>();
        Cast(y, x, RoundMode::CAST_RINT, n);
        Then();
        Cast(x, y, RoundMode::CAST_NONE, n);
        Then();
    }
}

// f32: exact to the last bit where the chip can be told so. dav-3510 documents 0 ulp with
// subnormals for this choice; for dav-2201 nothing is documented, and it is to be tested there.
__aicore__ inline void Divide(LocalTensor<float> out, LocalTensor<float> x, LocalTensor<float> by, uint32_t n)
{
#if STREAMQ_ARCH == 3510
    static constexpr DivConfig exact = {DivAlgo::PRECISION_0ULP_FTZ_FALSE};
    Div<float, exact>(out, x, by, n);
#else
    Div(out, x, by, n);
#endif
    Then();
}

// Scale = amax / levels, as a float.
class FloatScale {
public:
    using Out = float;

    // `n`: the most scales at a time, a multiple of 8.
    __aicore__ inline void Init(TPipe& pipe, ScaleArgs args, uint32_t n)
    {
        args_ = args;
        pipe.InitBuffer(levels_, n * sizeof(float));
        pipe.InitBuffer(zero_, n * sizeof(int32_t));
        pipe.InitBuffer(narrow_, RoundUp(n * sizeof(int16_t), BLOCK));
        Duplicate(levels_.Get<float>(), args.levels, n);
        Then();
    }

    // `top` f32 [n], amax, becomes what its block is divided by, and `out` what is stored.
    __aicore__ inline void Make(LocalTensor<float> top, LocalTensor<float> out, uint32_t n)
    {
        Divide(top, top, levels_.Get<float>(), n);
        RoundTo(top, narrow_.Get<int16_t>(), args_.stored, n);
        // By its bits, as a compare has to have 256 bytes: substitute * (1 - min(bits, 1)).
        LocalTensor<int32_t> zero = zero_.Get<int32_t>(), bits = top.ReinterpretCast<int32_t>();
        Mins(zero, bits, 1, n);
        Then();
        Muls(zero, zero, -args_.substitute, n);
        Then();
        Adds(zero, zero, args_.substitute, n);
        Then();
        Add(bits, bits, zero, n);
        Then();
        DataCopy(out, top, n);
        Then();
    }

private:
    ScaleArgs args_;
    TBuf<TPosition::VECCALC> levels_, zero_, narrow_;
};

}  // namespace streamq
