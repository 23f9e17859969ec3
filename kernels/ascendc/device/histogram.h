// How often each byte is in a tile: what the sparse codec makes its dictionaries of.
#pragma once

#include "tile.h"

namespace streamq {

constexpr uint32_t BYTES = 2048;  // at a time: counts up to this are exact in half
constexpr uint32_t BINS = 256;
constexpr uint32_t HALVES = 128;  // in a repeat
constexpr uint32_t SUMS = 16;     // partial sums of a bin, one a repeat: 32 bytes

// x u8 [tiles, size] -> counts f32 [tiles, 256], whole numbers. `size`: a multiple of 512, at most
// 65,024. There is no histogram instruction for bytes before dav-3510: each of the 256 values is
// compared with each byte, as halves, of which 128 are a repeat: min(|x|, 1) is 0 where they are
// equal, then 1 is taken from all. No step of it can round.
__global__ __vector__ void Histogram(GM_ADDR x, GM_ADDR counts, uint64_t tiles, uint32_t size)
{
    TPipe pipe;
    GlobalTensor<uint8_t> from;
    GlobalTensor<float> to;
    TQue<TPosition::VECIN, 1> in;
    TQue<TPosition::VECOUT, 1> out;
    TBuf<TPosition::VECCALC> x_, differ_, sums_, bins_, wide_;
    from.SetGlobalBuffer((__gm__ uint8_t*)x, tiles * size);
    to.SetGlobalBuffer((__gm__ float*)counts, tiles * BINS);
    pipe.InitBuffer(in, 2, BYTES);
    pipe.InitBuffer(out, 2, BINS * sizeof(float));
    pipe.InitBuffer(x_, BYTES * sizeof(half));
    pipe.InitBuffer(differ_, BYTES * sizeof(half));
    pipe.InitBuffer(sums_, BINS * SUMS * sizeof(half));
    pipe.InitBuffer(bins_, BINS * sizeof(half));
    pipe.InitBuffer(wide_, BINS * sizeof(float));
    LocalTensor<half> bytes = x_.Get<half>(), differ = differ_.Get<half>(), sums = sums_.Get<half>();
    LocalTensor<half> bins = bins_.Get<half>();
    LocalTensor<float> wide = wide_.Get<float>();
    for (Share s(tiles); s.first < s.last; ++s.first) {
        LocalTensor<float> total = out.AllocTensor<float>();
        Duplicate(total, static_cast<float>(size), BINS);
        for (uint32_t at = 0; at < size; at += BYTES) {
            uint32_t n = Least(BYTES, size - at), repeats = n / HALVES;
            LocalTensor<uint8_t> raw = in.AllocTensor<uint8_t>();
            DataCopy(raw, from[s.first * size + at], n);
            in.EnQue(raw);
            raw = in.DeQue<uint8_t>();
            Then();
            Cast(bytes, raw, RoundMode::CAST_NONE, n);
            Then();
            in.FreeTensor(raw);
            for (uint32_t value = 0; value < BINS; ++value) {
                Abs(differ, bytes, n);
                Then();
                Adds(bytes, bytes, static_cast<half>(-1.0f), n);
                Mins(differ, differ, static_cast<half>(1.0f), n);
                Then();
                ReduceRepeat<ReduceType::SUM>(sums[value * SUMS], differ, HALVES, repeats, 1, 1, 8);
                Then();
            }
            constexpr uint32_t most = 128;  // repeats are counted in 8 bits
            for (uint32_t bin = 0; bin < BINS; bin += most) {
                ReduceRepeat<ReduceType::SUM>(bins[bin], sums[bin * SUMS], repeats, most, 1, 1, 1);
            }
            Then();
            Cast(wide, bins, RoundMode::CAST_NONE, BINS);
            Then();
            Sub(total, total, wide, BINS);
        }
        out.EnQue(total);
        total = out.DeQue<float>();
        DataCopy(to[s.first * BINS], total, BINS);
        out.FreeTensor(total);
    }
}

}  // namespace streamq
