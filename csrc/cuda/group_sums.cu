// out[g, p, n] = Σ_{b in g} Σ_c partial[b, p, c, n], for two such sums in one launch. A warp reads 32 columns of a
// partial; a block's warps take every SUMMANDS-th partial in order, and their sums are added in the order of the warps.
// Bytes: 4 per partial sum, read once; the partials are a few per cent of the activation, so this is mostly its launch.
//
// Tested under emulation and compiled for sm_80, sm_90 and sm_100. Not run on a GPU yet; no launch constant is
// measured.
#include "group_sums.h"

#include "launch.h"

namespace actscale {
namespace cuda {
namespace {

constexpr int COLUMNS = 32, SUMMANDS = 16;  // threads per block: one warp a partial, at most 16 of them under way

__global__ void __launch_bounds__(COLUMNS* SUMMANDS) sum_groups_kernel(const GroupSums call) {
    int64_t block = blockIdx.x;
    const int64_t first = call.sum[0].tiles * call.groups * call.sum[0].positions;
    const bool is_first = block < first;
    if (!is_first) block -= first;
    const GroupSum s = is_first ? call.sum[0] : call.sum[1];
    const int column = int(threadIdx.x) % COLUMNS, summand = int(threadIdx.x) / COLUMNS;
    const int summands = int(blockDim.x) / COLUMNS;
    const int64_t n = block % s.tiles * COLUMNS + column, at = block / s.tiles;
    const int64_t g = at / s.positions, p = at % s.positions;
    const bool row_by_row = !call.group && call.groups > 1;
    const int parts = int(s.parts);  // of all rows, as many as the first launch had blocks
    const int begin = row_by_row ? int(g) * parts : 0, end = row_by_row ? begin + parts : int(call.rows) * parts;
    float total = 0;
    if (n < s.width)
#pragma unroll 4
        for (int r = begin + summand; r < end; r += summands) {
            const int64_t b = r / parts, part = r % parts;
            if (!call.group || call.group[b] == g)
                total += s.partial[((b * s.positions + p) * parts + part) * s.width + n];
        }
    float* sums = reinterpret_cast<float*>(dynamic_shared());
    sums[threadIdx.x] = total;
    __syncthreads();
    if (summand == 0 && n < s.width) {
        for (int i = 1; i < summands; i++) total += sums[i * COLUMNS + column];
        s.out[at * s.width + n] = total;
    }
}

}  // namespace

Error sum_groups(GroupSums sums, void* stream) {
    int64_t tiles = 0, summed = 1;
    for (GroupSum& s : sums.sum) {
        if (!s.partial) continue;
        s.tiles = ceil_div(s.width, COLUMNS);
        tiles += s.tiles * s.positions;
        summed = most(summed, (sums.group || sums.groups == 1 ? sums.rows : 1) * s.parts);
    }
    if (!tiles || !sums.groups) return nullptr;
    const int threads = COLUMNS * int(least(SUMMANDS, summed));
    return launch(sum_groups_kernel, Shape{tiles * sums.groups, threads, 1, threads * 4}, stream, sums);
}

}  // namespace cuda
}  // namespace actscale
