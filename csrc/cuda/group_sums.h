// Sums of partial sums over the rows of each group, in a fixed order: the second launch of a backward pass.
#pragma once
#include "kernels.h"

namespace actscale {
namespace cuda {

struct GroupSum {  // out[g, p, n] = Σ_{b in g} Σ_c partial[b, p, c, n]
    float* out;
    const float* partial;             // null: not wanted
    int64_t positions, parts, width;  // P, C, N
    int64_t tiles = 0;                // set by the launch
};

struct GroupSums {
    GroupSum sum[2];       // of one launch
    const int64_t* group;  // [B]; null: row g is group g, or all rows where there is one group
    int64_t rows, groups;
};

Error sum_groups(GroupSums sums, void* stream);

}  // namespace cuda
}  // namespace actscale
