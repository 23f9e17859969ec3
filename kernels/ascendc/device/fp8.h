// FP8 e4m3 codes. Only dav-3510 has the cast.
#pragma once

#include "scale.h"

namespace streamq {

class E4m3Codes {
public:
    using Out = uint8_t;

    __aicore__ inline void Init(TPipe& pipe, uint32_t quotient, int32_t low, int32_t high)
    {
        quotient_ = quotient;
        low_ = static_cast<float>(low);
        high_ = static_cast<float>(high);
        pipe.InitBuffer(narrow_, TILE * sizeof(half));
    }

    // `out` from the quotients `q` f32 [n], which are used up.
    __aicore__ inline void Make(LocalTensor<uint8_t> out, LocalTensor<float> q, uint32_t n)
    {
        RoundTo(q, narrow_.Get<int16_t>(), quotient_, n);
        // Before the cast, so that it does not matter whether the core is set to saturate.
        Mins(q, q, high_, n);
        Then();
        Maxs(q, q, low_, n);
        Then();
        Cast(out.ReinterpretCast<fp8_e4m3fn_t>(), q, RoundMode::CAST_RINT, n);
        Then();
    }

private:
    uint32_t quotient_;
    float low_, high_;
    TBuf<TPosition::VECCALC> narrow_;
};

}  // namespace streamq
