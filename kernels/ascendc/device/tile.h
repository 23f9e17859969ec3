// What the kernels share: parts of a matrix in and out of the Unified Buffer, and f32 of them.
//
// Every kernel is written for one vector core and for any number of blocks. Data dependencies are
// stated in full, by queues between pipes and by barriers inside of the vector pipe, although the
// compiler can add the latter: so the host shim of the tests can check them.
#pragma once

#include <type_traits>

#include "kernel_operator.h"

// 2002, 2201 or 3510: what bisheng is told as --npu-arch, for the host half of a file too.
#ifndef STREAMQ_ARCH
#error "compile with -DSTREAMQ_ARCH=2201 beside --npu-arch=dav-2201, or the like"
#endif

namespace streamq {

using namespace AscendC;

// Elements in one go, 16 KiB as f32: the buffers of a kernel that quantizes are at most 145 of the
// 183 KiB that dav-2201 leaves it (192 less 8 of the compiler's and 256 bytes).
constexpr uint32_t TILE = 4096;
constexpr uint32_t LANES = 64;   // f32 in one repeat of 256 bytes
constexpr uint32_t BLOCK = 32;   // bytes: what the Unified Buffer is aligned to
constexpr uint32_t PITCH = 128;  // elements from row to row of a tile that has several

constexpr uint32_t BF16 = 0, F16 = 1, F32 = 2;  // dtypes as the launchers number them

__aicore__ inline uint32_t RoundUp(uint32_t n, uint32_t step) { return (n + step - 1) / step * step; }

template <typename A>
__aicore__ inline A Least(A a, A b)
{
    return a < b ? a : b;
}

// All vector instructions so far are done before the next one starts.
__aicore__ inline void Then() { PipeBarrier<PIPE_V>(); }

// The second pipe of `event` waits for what the first one was given so far.
template <HardEvent event>
__aicore__ inline void Sync()
{
    TEventID id = GetTPipePtr()->FetchEventID(event);
    SetFlag<event>(id);
    WaitFlag<event>(id);
}

// This block's share of `n` units: first to last, whole runs, so that blocks write apart.
struct Share {
    uint64_t first, last;
    __aicore__ inline explicit Share(uint64_t n)
    {
        uint64_t blocks = GetBlockNum(), i = GetBlockIdx();
        first = n * i / blocks;
        last = n * (i + 1) / blocks;
    }
};

// A matrix [rows, cols], cut into units of [height, width] that share a scale; the last ragged. A
// unit is a row or a part of one, or it is at most PITCH columns wide.
struct Shape {
    uint64_t rows, cols, height, width;
    __aicore__ inline uint64_t Across() const { return (cols + width - 1) / width; }
    __aicore__ inline uint64_t Units() const { return (rows + height - 1) / height * Across(); }
    // Lanes that tiles of it fill, in whole repeats.
    __aicore__ inline uint32_t Lanes() const
    {
        return height > 1 ? TILE : RoundUp(Least<uint64_t>(TILE, width), LANES);
    }
};

// The tiles of a unit: `h` rows of `w` columns from `row` and `col` on, while More().
class Tiles {
public:
    __aicore__ inline Tiles(const Shape& shape, uint64_t unit)
    {
        row = unit / shape.Across() * shape.height;
        left_ = col = unit % shape.Across() * shape.width;
        bottom_ = Least(row + shape.height, shape.rows);
        right_ = Least(col + shape.width, shape.cols);
        tall_ = bottom_ - row > 1;
        Cut();
    }
    __aicore__ inline bool More() const { return row < bottom_; }
    __aicore__ inline void Next()
    {
        col += w;
        if (col >= right_) {
            col = left_;
            row += h;
        }
        Cut();
    }
    // Elements from the first to the last in the Unified Buffer.
    __aicore__ inline uint32_t Size() const { return h > 1 ? h * PITCH : w; }

    uint64_t row, col;
    uint32_t h, w;

private:
    __aicore__ inline void Cut()
    {
        h = tall_ ? Least<uint64_t>(TILE / PITCH, bottom_ - row) : 1;
        w = Least<uint64_t>(tall_ ? PITCH : TILE, right_ - col);
    }
    uint64_t left_, right_, bottom_;
    bool tall_;
};

// Tiles of a matrix of weights. T: bfloat16_t, half or float.
template <typename T>
class Source {
public:
    // Moved as integers, so that no number of type T is needed as a scalar.
    using Bits = std::conditional_t<sizeof(T) == 2, int16_t, int32_t>;

    __aicore__ inline void Init(TPipe& pipe, GM_ADDR x, uint64_t rows, uint64_t cols)
    {
        gm_.SetGlobalBuffer((__gm__ Bits*)x, rows * cols);
        cols_ = cols;
        pipe.InitBuffer(queue_, 2, TILE * sizeof(T));
        if constexpr (!std::is_same<T, float>::value) {
            pipe.InitBuffer(wide_, TILE * sizeof(float));
        }
    }

    // Rows `row` to row + h, columns `col` to col + w as f32. One row is dense; several, of at most
    // PITCH columns, lie PITCH elements apart, and what lies between is 0.
    __aicore__ inline LocalTensor<float> Load(uint64_t row, uint64_t col, uint32_t h, uint32_t w)
    {
        raw_ = queue_.template AllocTensor<Bits>();
        uint32_t bytes = w * sizeof(T), filled = RoundUp(bytes, BLOCK), gap = 0;
        if (h > 1) {
            gap = (PITCH * sizeof(T) - filled) / BLOCK;
            if (gap > 0) {
                Duplicate(raw_, Bits(0), h * PITCH);
                Sync<HardEvent::V_MTE2>();
            }
        }
        uint8_t pad = (filled - bytes) / sizeof(T);
        uint32_t skip = h > 1 ? (cols_ - w) * sizeof(T) : 0;
        DataCopyExtParams copy{static_cast<uint16_t>(h), bytes, skip, gap, 0};
        DataCopyPadExtParams<Bits> zeros{true, 0, pad, Bits(0)};
        DataCopyPad(raw_, gm_[row * cols_ + col], copy, zeros);
        queue_.EnQue(raw_);
        raw_ = queue_.template DeQue<Bits>();
        uint32_t n = h > 1 ? h * PITCH : w;
        if constexpr (std::is_same<T, float>::value) {
            return raw_.template ReinterpretCast<float>();
        } else {
            LocalTensor<float> x = wide_.Get<float>();
            Then();  // the tile before this one is still being read
            Cast(x, raw_.template ReinterpretCast<T>(), RoundMode::CAST_NONE, n);
            Then();
            return x;
        }
    }

    // The tile that Load gave last is no longer needed.
    __aicore__ inline void Free() { queue_.FreeTensor(raw_); }

private:
    GlobalTensor<Bits> gm_;
    TQue<TPosition::VECIN, 1> queue_;
    TBuf<TPosition::VECCALC> wide_;
    LocalTensor<Bits> raw_;
    uint64_t cols_;
};

// A tile from the Unified Buffer into a matrix of bytes, f32 or the like.
template <typename T>
class Sink {
public:
    __aicore__ inline void Init(TPipe& pipe, GM_ADDR out, uint64_t size, uint64_t cols, uint32_t tile)
    {
        gm_.SetGlobalBuffer((__gm__ T*)out, size);
        cols_ = cols;
        pipe.InitBuffer(queue_, 2, RoundUp(tile * sizeof(T), BLOCK));
    }

    __aicore__ inline LocalTensor<T> Begin() { return queue_.template AllocTensor<T>(); }

    // `tile` to rows `row` to row + h, columns `col` to col + w; laid out as Source::Load does.
    __aicore__ inline void End(LocalTensor<T> tile, uint64_t row, uint64_t col, uint32_t h, uint32_t w)
    {
        queue_.EnQue(tile);
        tile = queue_.template DeQue<T>();
        uint32_t bytes = w * sizeof(T);
        uint32_t gap = h > 1 ? (PITCH * sizeof(T) - RoundUp(bytes, BLOCK)) / BLOCK : 0;
        uint32_t skip = h > 1 ? (cols_ - w) * sizeof(T) : 0;
        DataCopyExtParams copy{static_cast<uint16_t>(h), bytes, gap, skip, 0};
        DataCopyPad(gm_[row * cols_ + col], tile, copy);
        queue_.FreeTensor(tile);
    }

private:
    GlobalTensor<T> gm_;
    TQue<TPosition::VECOUT, 1> queue_;
    uint64_t cols_;
};

}  // namespace streamq
