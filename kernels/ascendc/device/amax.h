// Largest magnitudes: of a unit of any size, and the kernel that gives one of each row.
#pragma once

#include "tile.h"

namespace streamq {

// Largest magnitude of units of a matrix, tile by tile.
template <typename T>
class Amax {
public:
    __aicore__ inline void Init(TPipe& pipe, GM_ADDR x, Shape shape)
    {
        shape_ = shape;
        source.Init(pipe, x, shape.rows, shape.cols);
        pipe.InitBuffer(magnitude_, TILE * sizeof(float));
        pipe.InitBuffer(most_, TILE * sizeof(float));
        pipe.InitBuffer(part_, LANES * sizeof(float));
        pipe.InitBuffer(top_, BLOCK);
    }

    // Element 0 of what is returned; the other 7 are 0.
    __aicore__ inline LocalTensor<float> Of(uint64_t unit)
    {
        LocalTensor<float> magnitude = magnitude_.Get<float>(), most = most_.Get<float>();
        LocalTensor<float> part = part_.Get<float>(), top = top_.Get<float>();
        uint32_t lanes = shape_.Lanes();
        Then();
        Duplicate(most, 0.0f, lanes);
        Duplicate(top, 0.0f, BLOCK / sizeof(float));
        Then();
        for (Tiles t(shape_, unit); t.More(); t.Next()) {
            LocalTensor<float> x = source.Load(t.row, t.col, t.h, t.w);
            Abs(magnitude, x, t.Size());
            Then();
            source.Free();
            Max(most, most, magnitude, t.Size());
            Then();
        }
        ReduceRepeat<ReduceType::MAX>(part, most, LANES, lanes / LANES, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
        Then();
        ReduceRepeat<ReduceType::MAX>(top, part, lanes / LANES, 1, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
        Then();
        return top;
    }

    Source<T> source;

private:
    Shape shape_;
    TBuf<TPosition::VECCALC> magnitude_, most_, part_, top_;
};

// x [rows, cols] -> out f32 [rows].
template <typename T>
__global__ __vector__ void RowAmax(GM_ADDR x, GM_ADDR out, uint64_t rows, uint64_t cols)
{
    TPipe pipe;
    Amax<T> amax;
    Sink<float> sink;
    amax.Init(pipe, x, Shape{rows, cols, 1, cols});
    sink.Init(pipe, out, rows, 1, BLOCK / sizeof(float));
    for (Share s(rows); s.first < s.last; ++s.first) {
        LocalTensor<float> top = amax.Of(s.first);
        LocalTensor<float> tile = sink.Begin();
        DataCopy(tile, top, BLOCK / sizeof(float));
        sink.End(tile, s.first, 0, 1, 1);
    }
}

}  // namespace streamq
