// Pruning by magnitude: of each row the largest elements stay, all others become 0.
#pragma once

#include "tile.h"

namespace streamq {

constexpr uint32_t CHUNK = 2048;  // elements at a time

// I: int16_t for bf16 and f16, int32_t for f32. Magnitudes are ordered as the bits without the sign
// are, so all of it is on integers: no rounding, no subnormals that a pipe may flush.
template <typename I>
class Magnitude {
public:
    __aicore__ inline void Init(TPipe& pipe, uint64_t cols)
    {
        cols_ = cols;
        pipe.InitBuffer(row_, 1, RoundUp(cols * sizeof(I), BLOCK));
        pipe.InitBuffer(out_, 2, CHUNK * sizeof(I));
        pipe.InitBuffer(mask_, CHUNK * sizeof(I));
        pipe.InitBuffer(index_, CHUNK * sizeof(I));
        pipe.InitBuffer(magnitude_, CHUNK * sizeof(I));
        pipe.InitBuffer(keep_, CHUNK * sizeof(I));
        pipe.InitBuffer(tie_, CHUNK * sizeof(I));
        pipe.InitBuffer(wide_, CHUNK * sizeof(float));
        pipe.InitBuffer(count_, CHUNK * sizeof(float));
        pipe.InitBuffer(part_, CHUNK / LANES * sizeof(float));
        pipe.InitBuffer(sum_, BLOCK);
        Duplicate(mask_.Get<I>(), std::is_same<I, int16_t>::value ? I(0x7FFF) : I(0x7FFFFFFF), CHUNK);
        CreateVecIndex(index_.Get<I>(), I(0), CHUNK);
        Then();
    }

    // Row `row` of `from` to `to`, all but its `keep` largest as 0; of equals the first stay.
    __aicore__ inline void Row(GlobalTensor<I> from, GlobalTensor<I> to, uint64_t row, uint32_t keep)
    {
        x_ = row_.AllocTensor<I>();
        uint32_t bytes = cols_ * sizeof(I), pad = RoundUp(bytes, BLOCK) - bytes;
        DataCopyExtParams copy{1, bytes, 0, 0, 0};
        DataCopyPadExtParams<I> zeros{true, 0, static_cast<uint8_t>(pad / sizeof(I)), 0};
        DataCopyPad(x_, from[row * cols_], copy, zeros);
        row_.EnQue(x_);
        x_ = row_.template DeQue<I>();

        // The keep-th largest magnitude, bit by bit from the highest.
        I least = 0;
        uint32_t reached = cols_, above = 0;  // how many are `least` or more, and how many are more
        for (int32_t bit = sizeof(I) * 8 - 2; bit >= 0; --bit) {
            I candidate = least | static_cast<I>(I(1) << bit);
            uint32_t found = Count(candidate, 0);
            if (found >= keep) {
                least = candidate;
                reached = found;
            } else {
                above = found;  // of the last bound that is too high: the next one above `least`
            }
        }
        // How many columns it takes until enough of those that are equal to it have come.
        uint32_t cut = cols_;
        if (reached != keep) {
            uint32_t low = 0;
            while (cut - low > 1) {
                uint32_t middle = low + (cut - low) / 2;
                if (above + Count(least, middle) >= keep) {
                    cut = middle;
                } else {
                    low = middle;
                }
            }
        }
        for (uint32_t at = 0; at < cols_; at += CHUNK) {
            uint32_t n = Least(CHUNK, cols_ - at);
            LocalTensor<I> keep_it = keep_.Get<I>(), tie = tie_.Get<I>();
            Ties(tie, at, n, least, cut);
            AtLeast(keep_it, least + 1, n);
            Add(keep_it, keep_it, tie, n);
            LocalTensor<I> out = out_.AllocTensor<I>();
            Then();
            Mul(out, x_[at], keep_it, n);
            out_.EnQue(out);
            out = out_.template DeQue<I>();
            DataCopyExtParams back{1, static_cast<uint32_t>(n * sizeof(I)), 0, 0, 0};
            DataCopyPad(to[row * cols_ + at], out, back);
            out_.FreeTensor(out);
            Then();
        }
        row_.FreeTensor(x_);
    }

private:
    // The magnitudes of a chunk. Two 16-bit halves for an int32_t, which And does not take.
    __aicore__ inline void Take(uint32_t at, uint32_t n)
    {
        And(magnitude_.Get<int16_t>(), x_[at].template ReinterpretCast<int16_t>(), mask_.Get<int16_t>(),
            n * sizeof(I) / sizeof(int16_t));
        Then();
    }

    // 1 where the magnitude is `bound` or more, else 0. No overflow: `bound` and it are finite.
    __aicore__ inline void AtLeast(LocalTensor<I> out, I bound, uint32_t n)
    {
        Adds(out, magnitude_.Get<I>(), static_cast<I>(1 - bound), n);
        Then();
        Clip(out, n);
    }

    // 1 where the magnitude is `bound` and the column is before `cut`, else 0. Takes the chunk.
    __aicore__ inline void Ties(LocalTensor<I> out, uint32_t at, uint32_t n, I bound, uint32_t cut)
    {
        LocalTensor<I> other = wide_.Get<I>();
        Take(at, n);
        AtLeast(out, bound, n);
        AtLeast(other, bound + 1, n);
        Sub(out, out, other, n);
        uint32_t before = cut > at ? Least(cut - at, CHUNK) : 0;
        Then();
        Muls(other, index_.Get<I>(), I(-1), n);
        Then();
        Adds(other, other, static_cast<I>(before), n);
        Then();
        Clip(other, n);
        Mul(out, out, other, n);
        Then();
    }

    // To 0 or 1.
    __aicore__ inline void Clip(LocalTensor<I> x, uint32_t n)
    {
        Maxs(x, x, I(0), n);
        Then();
        Mins(x, x, I(1), n);
        Then();
    }

    // How many magnitudes are `bound` or more; with a cut, how many are `bound` before it.
    __aicore__ inline uint32_t Count(I bound, uint32_t cut)
    {
        LocalTensor<float> count = count_.Get<float>(), part = part_.Get<float>(), sum = sum_.Get<float>();
        LocalTensor<float> wide = wide_.Get<float>();
        LocalTensor<I> found = keep_.Get<I>();
        constexpr RoundMode exact = std::is_same<I, int16_t>::value ? RoundMode::CAST_NONE : RoundMode::CAST_RINT;
        Duplicate(count, 0.0f, CHUNK);
        for (uint32_t at = 0; at < cols_; at += CHUNK) {
            uint32_t n = Least(CHUNK, cols_ - at);
            if (cut > 0) {
                Ties(found, at, n, bound, cut);
            } else {
                Take(at, n);
                AtLeast(found, bound, n);
            }
            Cast(wide, found, exact, n);
            Then();
            Add(count, count, wide, n);
            Then();
        }
        ReduceRepeat<ReduceType::SUM>(part, count, LANES, CHUNK / LANES, 1, 1, 8);
        Then();
        ReduceRepeat<ReduceType::SUM>(sum, part, CHUNK / LANES, 1, 1, 1, 8);
        Sync<HardEvent::V_S>();
        uint32_t n = static_cast<uint32_t>(sum.GetValue(0));
        Sync<HardEvent::S_V>();
        Then();
        return n;
    }

    uint32_t cols_;
    TQue<TPosition::VECIN, 1> row_;
    TQue<TPosition::VECOUT, 1> out_;
    TBuf<TPosition::VECCALC> mask_, index_, magnitude_, keep_, tie_, wide_, count_, part_, sum_;
    LocalTensor<I> x_;
};

// x [rows, cols] -> out of the same dtype; 1 <= keep <= cols. A row is kept whole beside 72 KiB of
// other buffers, so it has at most 96 KiB.
template <typename I>
__global__ __vector__ void KeepLargest(GM_ADDR x, GM_ADDR out, uint64_t rows, uint64_t cols, uint32_t keep)
{
    TPipe pipe;
    Magnitude<I> magnitude;
    GlobalTensor<I> from, to;
    from.SetGlobalBuffer((__gm__ I*)x, rows * cols);
    to.SetGlobalBuffer((__gm__ I*)out, rows * cols);
    magnitude.Init(pipe, cols);
    for (Share s(rows); s.first < s.last; ++s.first) {
        magnitude.Row(from, to, s.first, keep);
    }
}

}  // namespace streamq
