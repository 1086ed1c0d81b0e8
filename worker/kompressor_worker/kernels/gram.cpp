// Sums of x^T x, one triangle computed, both written (BLAS: SYRK). Register tiles as in the column loop: TILE rows of the result by a PANEL
// of its columns, for DEPTH rows of x at a time, whose sums begin at zero. bf16 goes by pairs of rows where the CPU multiplies those.

namespace {

constexpr int64_t DEPTH = 512;  // rows of x: a panel of them fits the L2 cache, a tile the L1

#if defined(__AVX512BF16__)
constexpr bool PAIRS = true;
inline F add_products(uint32_t a, U b, F sum) {
    return cast<F>(_mm512_dpbf16_ps(cast<__m512>(sum), cast<__m512bh>(usplat(a)), cast<__m512bh>(b)));
}
#else
constexpr bool PAIRS = false;
inline F add_products(uint32_t, U, F sum) { return sum; }
#endif

// out [N][PANEL] = sum over `count` of tile[N] x panel[PANEL]: fp32 numbers, or pairs of bf16. The tile of numbers is negated.
template <int N, bool pairs>
__attribute__((noinline)) void multiply(const uint32_t* tile, const uint32_t* panel, int64_t count, float* out) {
    F sums[N][2] = {};
    for (int64_t r = 0; r < count; r++, tile += TILE, panel += PANEL) {
        const F first = in_register(fetch_as<F>(panel)), second = in_register(fetch_as<F>(panel + LANES));
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            if constexpr (pairs) {
                sums[n][0] = add_products(tile[n], cast<U>(first), sums[n][0]);
                sums[n][1] = add_products(tile[n], cast<U>(second), sums[n][1]);
            } else {
                const F u = cast<float>(tile[n]) - F{};
                sums[n][0] = minus_product(first, u, sums[n][0]), sums[n][1] = minus_product(second, u, sums[n][1]);
            }
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) put(out + n * PANEL, sums[n][0]), put(out + n * PANEL + LANES, sums[n][1]);
}

struct Gram {
    const char* x;  // [rows, n]
    int64_t rows, n;
    float* sums;  // [n, n]
};

// `width` columns of x from `left` on, of the rows [top, bottom): [steps][width], a step being a row or a pair
// of rows. Zeros beyond the edges.
template <int T, bool pairs, bool negated>
void pack_columns(const Gram& job, int64_t top, int64_t bottom, int64_t left, int64_t width, uint32_t* packed) {
    const int64_t count = std::min(width, job.n - left);
    for (int64_t row = top; row < bottom; row += pairs ? 2 : 1, packed += width) {
        const char* p = job.x + (row * job.n + left) * ::width<T>();
        if constexpr (pairs) {
            uint16_t one[PANEL] = {}, other[PANEL] = {};
            std::memcpy(one, p, count * 2);
            if (row + 1 < bottom) std::memcpy(other, p + job.n * 2, count * 2);
            for (int64_t k = 0; k < width; k++) packed[k] = one[k] | uint32_t(other[k]) << 16;
        } else {
            for (int64_t k = 0; k < count; k += LANES) {
                const F v = load_some<T>(p + k * ::width<T>(), std::min(LANES, count - k)), signed_one = negated ? -v : v;
                std::memcpy(packed + k, &signed_one, std::min(LANES, count - k) * 4);
            }
            std::fill(packed + count, packed + width, 0u);
        }
    }
}

// Adds a tile of products to the rows from `top` on and the columns from `left` on, below the diagonal; mirrors it, if it is the last.
void add_tile(const Gram& job, const float* products, int64_t top, int64_t left, bool last) {
    const int64_t rows = std::min(TILE, job.n - top), columns = std::min(PANEL, job.n - left);
    alignas(64) float mirrored[PANEL][TILE];
    for (int64_t j = 0; j < rows; j++) {
        float* to = job.sums + (top + j) * job.n + left;
        const int64_t below = std::min(columns, top + j - left + 1);
        for (int64_t i = 0; i < below; i++) to[i] += products[j * PANEL + i];
        if (last)
            for (int64_t i = 0; i < below; i++) mirrored[i][j] = to[i];
    }
    if (!last) return;
    for (int64_t i = 0; i < columns; i++) {
        const int64_t first = std::max<int64_t>(0, left + i - top);
        if (first < rows) std::memcpy(job.sums + (left + i) * job.n + top + first, mirrored[i] + first, (rows - first) * sizeof(float));
    }
}

template <int T, bool pairs> void add_gram(const Gram& job, int threads) {
    const int64_t panels = (job.n + PANEL - 1) / PANEL, tiles = (job.n + TILE - 1) / TILE, depth = pairs ? DEPTH / 2 : DEPTH;
    std::vector<F> aligned(panels * depth * PANEL / LANES), aligned_tiles((tiles * depth * TILE + LANES - 1) / LANES);
    uint32_t* const by_panel = reinterpret_cast<uint32_t*>(aligned.data());
    uint32_t* const by_tile = reinterpret_cast<uint32_t*>(aligned_tiles.data());
    for (int64_t top = 0; top < job.rows; top += DEPTH) {
        const int64_t bottom = std::min(top + DEPTH, job.rows), steps = pairs ? (bottom - top + 1) / 2 : bottom - top;
        parallel(panels, threads, [&](int64_t p) {
            pack_columns<T, pairs, false>(job, top, bottom, p * PANEL, PANEL, by_panel + p * depth * PANEL);
            for (int64_t t = p * tiles / panels; t < (p + 1) * tiles / panels; t++)
                pack_columns<T, pairs, true>(job, top, bottom, t * TILE, TILE, by_tile + t * depth * TILE);
        });
        parallel(panels, threads, [&](int64_t p) {
            alignas(64) float products[TILE * PANEL];
            for (int64_t t = p * PANEL / TILE; t < tiles; t++) {
                multiply<TILE, pairs>(by_tile + t * depth * TILE, by_panel + p * depth * PANEL, steps, products);
                add_tile(job, products, t * TILE, p * PANEL, bottom == job.rows);
            }
        });
    }
}

}  // namespace

// sums [n, n] += x^T x for x [rows, n].
extern "C" void kompressor_add_gram(const void* x, int dtype, int64_t rows, int64_t n, float* sums, int threads) {
    const Gram job{static_cast<const char*>(x), rows, n, sums};
    if (dtype == BF16) add_gram<BF16, PAIRS>(job, threads);
    if (dtype == FP16) add_gram<FP16, false>(job, threads);
    if (dtype == FP32) add_gram<FP32, false>(job, threads);
}
