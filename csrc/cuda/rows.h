// How a block reads a row of logits: 16-byte vectors on the grid of the gradient's row, whatever the row's own
// alignment.
//
// Rows of odd width (V = 50257 in bf16) start off the 16-byte grid. The vectors of a row lie on the grid of the tensor
// that is written, so the first one may begin up to WIDTH - 1 columns before the row and the last one end behind it. A
// tensor on the same grid is copied asynchronously; one that is off by another amount (logits that are a slice of [B,
// T, V] beside a contiguous reference) is read as two vectors on its own grid and shifted into place. The vectors at
// the two ends are read an element at a time: nothing outside of the row is touched, and what lies there counts as
// -inf.
#pragma once
#include "device.h"

namespace actscale {
namespace cuda {

constexpr int64_t MOST_COLUMNS = (int64_t(1) << 31) - (1 << 20);  // columns are counted in 32 bits, rows in 64
constexpr const char* TOO_MANY_COLUMNS = "rows of more than 2^31 - 2^20 logits";

// 16 bytes that begin `bytes` (< 16) into the 32 of `low` and `high`.
DEVICE Vector shifted(const Vector& low, const Vector& high, int bytes) {
    uint32_t w[8];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = low.word[i], w[4 + i] = high.word[i];
#pragma unroll
    for (int i = 0; i < 6; i++) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; i++) w[i] = bytes & 4 ? w[i + 1] : w[i];
    Vector out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.word[i] = bytes & 2 ? (w[i] >> 16) | (w[i + 1] << 16) : w[i];
    return out;
}

// One vector of the row, read an element at a time; -inf beyond the row's ends.
template <class T> DEVICE Vector part_of(const T* row, int column, int vocab) {
    Vector out = {};
#pragma unroll
    for (int e = 0; e < WIDTH<T>; e++) {
        T value = minus_infinity(T());
        if (column + e >= 0 && column + e < vocab) value = row[column + e];
        out.word[e * sizeof(T) / 4] |= uint32_t(value.bits) << (e * sizeof(T) * 8 % 32);
    }
    return out;
}

// One vector of the row, its first element `column` (may be negative), into its slot of this thread's own.
template <class T> DEVICE void fetch(const T* row, int column, int vocab, bool on_grid, Vector* slot) {
    constexpr int W = WIDTH<T>;
    const T* from = row + column;
    if (on_grid && column >= 0 && column + W <= vocab) {
        copy_async(slot, from);
        return;
    }
    const int before = off_grid(from);
    if (column - before >= 0 && column - before + 2 * W <= vocab) {  // both vectors lie in the row
        const Vector* aligned = reinterpret_cast<const Vector*>(from - before);
        const Vector low = aligned[0], high = aligned[1];  // copies: two 16-byte loads, not eight of 4
        *slot = shifted(low, high, before * int(sizeof(T)));
        return;
    }
    *slot = part_of(row, column, vocab);
}

// One vector into the row, on whose grid it lies; at the ends, its elements that are in the row.
template <class T> DEVICE void put(T* row, int column, int vocab, const Vector& value) {
    constexpr int W = WIDTH<T>;
    if (column >= 0 && column + W <= vocab) {
        *reinterpret_cast<Vector*>(row + column) = value;
        return;
    }
#pragma unroll
    for (int e = 0; e < W; e++) {
        const uint32_t word = value.word[e * sizeof(T) / 4];
        if (column + e >= 0 && column + e < vocab)
            row[column + e].bits = decltype(T::bits)(word >> (e * sizeof(T) * 8 % 32));
    }
}

}  // namespace cuda
}  // namespace actscale
