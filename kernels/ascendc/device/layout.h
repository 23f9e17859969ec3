// ND to FRACTAL_NZ, for elements of any width: a matter of fragments of 32 bytes.
#pragma once

#include "tile.h"

namespace streamq {

constexpr uint32_t NZ_ROWS = 128;      // of a tile; one write is NZ_ROWS * 32 bytes
constexpr uint32_t NZ_FRAGMENTS = 16;  // along k; two tiles are 128 KiB
constexpr uint32_t NZ_LINES = 16;      // rows of a fractal

// x u8 [rows, bytes] -> out u8 [ceil(bytes / 32), lines, 32], lines = rows rounded up to 16; what
// the matrix does not fill is 0. On dav-2002 `bytes` is a multiple of 32.
__global__ __vector__ void ToNz(GM_ADDR x, GM_ADDR out, uint64_t rows, uint64_t bytes)
{
    TPipe pipe;
    GlobalTensor<uint8_t> from, to;
    TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> queue;
    TBuf<TPosition::VECCALC> zero_;
    uint64_t fragments = (bytes + BLOCK - 1) / BLOCK, lines = (rows + NZ_LINES - 1) / NZ_LINES * NZ_LINES;
    from.SetGlobalBuffer((__gm__ uint8_t*)x, rows * bytes);
    to.SetGlobalBuffer((__gm__ uint8_t*)out, fragments * lines * BLOCK);
    pipe.InitBuffer(queue, 2, NZ_ROWS * NZ_FRAGMENTS * BLOCK);
    pipe.InitBuffer(zero_, NZ_LINES * BLOCK);
    Duplicate(zero_.Get<int16_t>(), static_cast<int16_t>(0), NZ_LINES * BLOCK / sizeof(int16_t));
    Sync<HardEvent::V_MTE3>();
    LocalTensor<uint8_t> zero = zero_.Get<uint8_t>();
    uint64_t across = (fragments + NZ_FRAGMENTS - 1) / NZ_FRAGMENTS;
    uint64_t down = (rows + NZ_ROWS - 1) / NZ_ROWS;
    for (Share s(across * down); s.first < s.last; ++s.first) {
        uint64_t row = s.first / across * NZ_ROWS, first = s.first % across * NZ_FRAGMENTS;
        uint16_t h = Least<uint64_t>(NZ_ROWS, rows - row), m = Least<uint64_t>(NZ_FRAGMENTS, fragments - first);
        uint32_t w = Least<uint64_t>(m * BLOCK, bytes - first * BLOCK);
        LocalTensor<uint8_t> tile = queue.AllocTensor<uint8_t>();
#if STREAMQ_ARCH == 2002
        DataCopyParams copy{h, m, static_cast<uint16_t>((bytes - w) / BLOCK), 0};
        DataCopy(tile, from[row * bytes + first * BLOCK], copy);
#else
        DataCopyExtParams copy{h, w, static_cast<uint32_t>(bytes - w), 0, 0};
        DataCopyPadExtParams<uint8_t> zeros{true, 0, static_cast<uint8_t>(m * BLOCK - w), 0};
        DataCopyPad(tile, from[row * bytes + first * BLOCK], copy, zeros);
#endif
        queue.EnQue(tile);
        tile = queue.DeQue<uint8_t>();
        uint32_t empty = row + h == rows ? (lines - rows) * BLOCK : 0;
        for (uint16_t f = 0; f < m; ++f) {
            uint64_t at = (first + f) * lines;
            DataCopy(to[(at + row) * BLOCK], tile[f * BLOCK], DataCopyParams{h, 1, static_cast<uint16_t>(m - 1), 0});
            if (empty > 0) {
                DataCopy(to[(at + rows) * BLOCK], zero, empty);
            }
        }
        queue.FreeTensor(tile);
    }
}

}  // namespace streamq
