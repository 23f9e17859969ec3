// Weights to codes of one byte: a scale for each unit, or for each run of a few columns.
#pragma once

#include "amax.h"
#include "scale.h"

namespace streamq {

// A scale for each unit of [height, width]: rows, or blocks of up to PITCH columns. Every unit is
// read twice. `given`: the scales are in memory, f32, one a unit, and are not written.
template <typename T, typename Codes, bool given>
__global__ __vector__ void QuantizeUnits(
    GM_ADDR x, GM_ADDR codes, GM_ADDR scale, Shape shape, ScaleArgs args, int32_t low, int32_t high)
{
    TPipe pipe;
    Amax<T> amax;
    FloatScale rule;
    Codes coder;
    Sink<typename Codes::Out> bytes;
    Sink<float> scales;
    Source<float> scales_in;
    TBuf<TPosition::VECCALC> divisor_, quotient_;
    amax.Init(pipe, x, shape);
    coder.Init(pipe, args.quotient, low, high);
    bytes.Init(pipe, codes, shape.rows * shape.cols, shape.cols, TILE);
    pipe.InitBuffer(divisor_, TILE * sizeof(float));
    pipe.InitBuffer(quotient_, TILE * sizeof(float));
    constexpr uint32_t few = BLOCK / sizeof(float);
    if constexpr (given) {
        scales_in.Init(pipe, scale, shape.Units(), 1);
    } else {
        rule.Init(pipe, args, few);
        scales.Init(pipe, scale, shape.Units(), 1, few);
    }
    LocalTensor<float> divisor = divisor_.Get<float>(), quotient = quotient_.Get<float>();
    for (Share s(shape.Units()); s.first < s.last; ++s.first) {
        LocalTensor<float> top;
        if constexpr (given) {
            top = scales_in.Load(s.first, 0, 1, 1);
            Sync<HardEvent::MTE2_S>();
        } else {
            top = amax.Of(s.first);
            LocalTensor<float> out = scales.Begin();
            rule.Make(top, out, few);
            scales.End(out, s.first, 0, 1, 1);
            Sync<HardEvent::V_S>();
        }
        float value = top.GetValue(0);
        Sync<HardEvent::S_V>();
        if constexpr (given) {
            scales_in.Free();
        }
        Then();
        Duplicate(divisor, value, shape.Lanes());
        Then();
        for (Tiles t(shape, s.first); t.More(); t.Next()) {
            LocalTensor<float> w = amax.source.Load(t.row, t.col, t.h, t.w);
            Divide(quotient, w, divisor, t.Size());
            amax.source.Free();
            LocalTensor<typename Codes::Out> out = bytes.Begin();
            coder.Make(out, quotient, t.Size());
            bytes.End(out, t.row, t.col, t.h, t.w);
        }
    }
}

// The most groups in a tile: a repeat each, of which an instruction has at most 255, in eights.
constexpr uint32_t GROUPS = 248;

// A scale for each run of `group` elements, a multiple of 8 up to TILE / 8; `count` of them, one
// behind the other: rows need not be told apart. Every element is read once.
template <typename T, typename Scale, typename Codes>
__global__ __vector__ void QuantizeGroups(
    GM_ADDR x, GM_ADDR codes, GM_ADDR scale, uint64_t count, uint32_t group, ScaleArgs args, int32_t low,
    int32_t high)
{
    TPipe pipe;
    Source<T> source;
    Scale rule;
    Codes coder;
    Sink<typename Codes::Out> bytes;
    Sink<typename Scale::Out> scales;
    TBuf<TPosition::VECCALC> work_, divisor_, top_, part_;
    source.Init(pipe, x, count, group);
    rule.Init(pipe, args, GROUPS);
    coder.Init(pipe, args.quotient, low, high);
    bytes.Init(pipe, codes, count * group, group, TILE);
    scales.Init(pipe, scale, count, 1, GROUPS);
    pipe.InitBuffer(work_, TILE * sizeof(float));
    pipe.InitBuffer(divisor_, TILE * sizeof(float));
    pipe.InitBuffer(top_, GROUPS * sizeof(float));
    pipe.InitBuffer(part_, GROUPS * sizeof(float));
    LocalTensor<float> work = work_.Get<float>(), divisor = divisor_.Get<float>();
    LocalTensor<float> top = top_.Get<float>(), part = part_.Get<float>();
    Duplicate(top, 0.0f, GROUPS);  // Brcb reads eight, whatever there are
    Then();
    uint32_t most = Least(GROUPS, TILE / group / 8 * 8);
    for (Share s(count); s.first < s.last; s.first += most) {
        uint32_t groups = Least<uint64_t>(most, s.last - s.first), n = groups * group;
        uint32_t eights = RoundUp(groups, 8);
        LocalTensor<float> w = source.Load(s.first, 0, 1, n);
        Abs(work, w, n);
        Then();
        for (uint32_t lane = 0; lane < group; lane += LANES) {
            // A repeat a group: the lanes from `lane` on, the next group group / 8 blocks further.
            ReduceRepeat<ReduceType::MAX>(
                lane == 0 ? top : part, work[lane], Least(LANES, group - lane), groups, 1, 1, group / 8,
                ReduceOrder::ORDER_ONLY_VALUE);
            Then();
            if (lane > 0) {
                Max(top, top, part, groups);
                Then();
            }
        }
        LocalTensor<typename Scale::Out> out = scales.Begin();
        rule.Make(top, out, eights);
        scales.End(out, s.first, 0, 1, groups);
        for (uint32_t at = 0; at < group; at += 8) {
            // Eight elements of every group from its scale, eight groups a repeat.
            BrcbRepeatParams strides{static_cast<uint16_t>(group / 8), static_cast<uint16_t>(group)};
            Brcb(divisor[at], top, eights / 8, strides);
        }
        Then();
        Divide(work, w, divisor, n);
        source.Free();
        LocalTensor<typename Codes::Out> tile = bytes.Begin();
        coder.Make(tile, work, n);
        bytes.End(tile, s.first, 0, 1, n);
    }
}

}  // namespace streamq
