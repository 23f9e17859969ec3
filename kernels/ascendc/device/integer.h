// int8 codes, and narrower ones, one a byte.
#pragma once

#include "scale.h"

namespace streamq {

class IntCodes {
public:
    using Out = int8_t;

    __aicore__ inline void Init(TPipe& pipe, uint32_t quotient, int32_t low, int32_t high)
    {
        quotient_ = quotient;
        low_ = static_cast<float>(low);
        high_ = static_cast<float>(high);
        pipe.InitBuffer(narrow_, TILE * sizeof(half));
    }

    // `out` from the quotients `q` f32 [n], which are used up.
    __aicore__ inline void Make(LocalTensor<int8_t> out, LocalTensor<float> q, uint32_t n)
    {
        LocalTensor<half> narrow = narrow_.Get<half>();
        RoundTo(q, narrow_.Get<int16_t>(), quotient_, n);
        Mins(q, q, high_, n);
        Then();
        Maxs(q, q, low_, n);
        Then();
        // dav-2201 casts to int8 from half only. Rounded to an integer while it is f32, a code is
        // exact as half; straight to half it would be rounded twice.
        Cast(q, q, RoundMode::CAST_RINT, n);
        Then();
        Cast(narrow, q, RoundMode::CAST_RINT, n);
        Then();
        Cast(out, narrow, RoundMode::CAST_RINT, n);
        Then();
    }

private:
    uint32_t quotient_;
    float low_, high_;
    TBuf<TPosition::VECCALC> narrow_;
};

}  // namespace streamq
