// GPTQ's column loop; the specification is `column_loop.py`. Rows never meet, so each thread takes some through all columns.
// Lanes are rows: a panel of them lies column by column, [columns][PANEL], and everything is arithmetic on whole vectors.
//
// Left-looking: a leaf of columns first takes what all columns before it have left, as a matrix product that reads their errors and writes
// only the leaf; then its columns are rounded one by one, and their errors take the place of their weights. Every weight takes the errors
// in the order of the columns, each by one fused multiply-add: the result does not depend on threads, leaves or the width of the vectors.

namespace {

constexpr int64_t PANEL = 2 * LANES;
#if defined(__AVX512F__)
constexpr int64_t TILE = 12;  // columns of a register tile: 24 of 32 registers hold sums
#else
constexpr int64_t TILE = 6;  // 12 of 16
#endif
constexpr int64_t LEAF = 128;     // columns: a panel of errors of so many fits the L1 cache
constexpr int64_t TOGETHER = 16;  // panels that share one packed piece of the factor, fewer where they would not fit the cache
constexpr int64_t CACHE = 12 << 20;

struct Columns {
    const float *weight, *factor;  // [rows, columns], [columns, columns]
    int64_t rows, columns, stride;  // stride: of step and zero_point, whole panels
    const float *step, *zero_point;  // [groups, stride]; null where the grid is made here; zero_point null if symmetric
    const int32_t* group_of;
    int64_t group_size;               // of the groups whose grid is made here, else 0
    float *made_step, *made_zero_point;  // [groups, stride]
    int dtype;                            // that the made steps are rounded to
    uint8_t* codes;                       // [rows, columns]
    double* loss;                         // [panels]
    const uint8_t* mask;                  // [rows, columns], 1 where the code must be that of zero; or null
};

template <class Codec> struct Masked : Codec {
    using Codec::Codec;
    explicit Masked(const Codec& codec) : Codec(codec) {}
};
template <class Codec> constexpr bool masked = false;
template <class Codec> constexpr bool masked<Masked<Codec>> = true;

// c - a * b, rounded once wherever the CPU has such an instruction.
inline F minus_product(F a, F b, F c) {
#if defined(__AVX512F__)
    return cast<F>(_mm512_fnmadd_ps(cast<__m512>(a), cast<__m512>(b), cast<__m512>(c)));
#elif defined(__FMA__)
    return cast<F>(_mm256_fnmadd_ps(cast<__m256>(a), cast<__m256>(b), cast<__m256>(c)));
#elif defined(__FP_FAST_FMAF)
    for (int64_t i = 0; i < LANES; i++) c[i] = __builtin_fmaf(-a[i], b[i], c[i]);
    return c;
#else
    return c - a * b;
#endif
}

inline F fetch(const float* p) { return load<FP32>(reinterpret_cast<const char*>(p)); }
inline void put(float* p, F f) { std::memcpy(p, &f, sizeof f); }

// Kept there: g++ would else load it anew for each multiplication.
inline F in_register(F f) {
#if defined(__AVX512F__)
    asm("" : "+v"(f));
#elif defined(__AVX2__)
    asm("" : "+x"(f));
#endif
    return f;
}

// N columns of a panel at c less the product of `count` columns of errors with the factor's rows, N used of TILE numbers each.
template <int N> __attribute__((noinline)) void take(const float* errors, const float* factor, int64_t count, float* c) {
    F sums[N][2];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sums[n][0] = fetch(c + n * PANEL), sums[n][1] = fetch(c + n * PANEL + LANES);
    for (int64_t j = 0; j < count; j++, errors += PANEL, factor += TILE) {
        const F first = in_register(fetch(errors)), second = in_register(fetch(errors + LANES));
#pragma GCC unroll 16
        for (int n = 0; n < N; n++) {
            const F u = factor[n] - F{};  // not splat(), whose sum with zero is an instruction
            sums[n][0] = minus_product(first, u, sums[n][0]), sums[n][1] = minus_product(second, u, sums[n][1]);
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) put(c + n * PANEL, sums[n][0]), put(c + n * PANEL + LANES, sums[n][1]);
}

__attribute__((noinline)) void take_some(int64_t n, const float* errors, const float* factor, int64_t count, float* c) {
    if (n >= TILE) return take<TILE>(errors, factor, count, c);
    if (n >= 8 && TILE > 8) take<8>(errors, factor, count, c), n -= 8, factor += 8, c += 8 * PANEL;
    if (n >= 4) take<4>(errors, factor, count, c), n -= 4, factor += 4, c += 4 * PANEL;
    if (n >= 2) take<2>(errors, factor, count, c), n -= 2, factor += 2, c += 2 * PANEL;
    if (n >= 1) take<1>(errors, factor, count, c);
}

// The factor's rows [top, bottom) and columns [left, right) as tiles of columns, [tiles][bottom - top][TILE]. Meanwhile the rows below, up
// to `next`, which are the next to be packed, come into the cache.
void pack(const Columns& job, int64_t top, int64_t bottom, int64_t next, int64_t left, int64_t right, float* packed) {
    for (int64_t j = top; j < bottom; j++) {
        const float* from = job.factor + j * job.columns;
        float* to = packed + (j - top) * TILE;
        int64_t k = left;
        for (; k + TILE <= right; k += TILE, to += (bottom - top) * TILE) std::memcpy(to, from + k, TILE * sizeof(float));
        for (; k < right; k++) *to++ = from[k];
        if (j + bottom - top < next)
            for (k = left; k < right; k += 16) __builtin_prefetch(from + (bottom - top) * job.columns + k, 0, 2);
    }
}

inline F stored(int dtype, F scale) {
    return dtype == BF16 ? stored<BF16>(scale) : dtype == FP16 ? stored<FP16>(scale) : stored<FP32>(scale);
}

// The grid of a group from its weights as they are, as `grid.grid_of_range` makes it.
template <class Codec> void make_grid(Codec codec, const Columns& job, const float* weights, int64_t count, int64_t group, int64_t row) {
    if constexpr (std::is_base_of_v<Symmetric, Codec>) {
        for (int64_t half = 0; half < PANEL; half += LANES) {
            F low{}, high{};
            for (int64_t k = 0; k < count; k++) {
                const F x = fetch(weights + k * PANEL + half);
                low = x < low ? x : low, high = x > high ? x : high;
            }
            const int64_t at = group * job.stride + row + half;
            if constexpr (Codec::asymmetric) {
                const float bottom = -codec.top - 1;
                const F scale = (high - low) / (codec.top - bottom);
                F zero_point = bottom - low / scale;
                zero_point = zero_point == zero_point ? zero_point : F{};  // 0/0: a group of zeros
                put(job.made_zero_point + at, (clamp(zero_point, bottom, codec.top) + MAGIC) - MAGIC);
                put(job.made_step + at, stored(job.dtype, scale));
            } else {
                put(job.made_step + at, stored(job.dtype, codec.scale(-low > high ? -low : high)));
            }
        }
    }
}

struct Fp4InFp8 : Fp4 {  // codes as E4M3, which holds every value of E2M1
    using Fp4::Fp4;
    Rounded round(F x) const {
        Rounded r = Fp4::round(x);
        r.code = (round_to_float<3, -6>(cast<F>(cast<U>(r.value) & 0x7fffffffu)).code) | (x < F{} ? usplat(0x80) : U{});
        return r;
    }
};

// Rounds half a column of a panel: its errors, and the codes, which take the place of the mask.
template <class Codec>
inline F round_half(Codec codec, const Columns& job, int64_t at, float diagonal, F w, uint8_t* codes, int64_t part, Squares& loss) {
    const F step = fetch(job.step + at);
    F x = w / step, zero_point{};
    if constexpr (masked<Codec>) {
        B goes;
        std::memcpy(&goes, codes, sizeof goes);
        x = widen(goes) != 0u ? F{} : x;
    }
    if constexpr (Codec::asymmetric) zero_point = fetch(job.zero_point + at), x = x + zero_point;
    const Rounded r = codec.round(x);
    const B bytes = narrow(r.code);
    std::memcpy(codes, &bytes, sizeof bytes);
    const F error = (w - (Codec::asymmetric ? r.value - zero_point : r.value) * step) / diagonal;
    loss.add(error, part);
    return error;
}

// N columns of a panel, whose errors take their place. `factor` is their square of it, TILE numbers a row; `group` that of each.
template <int N, class Codec, class Group>
__attribute__((noinline)) void round_tile(Codec codec, const Columns& job, Group group, int64_t row, const float* factor, float* tile,
                                          uint8_t* codes, Squares& loss) {
    F w[N][2];
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) w[n][0] = fetch(tile + n * PANEL), w[n][1] = fetch(tile + n * PANEL + LANES);
#pragma GCC unroll 16
    for (int j = 0; j < N; j++) {
        const float* u = factor + j * TILE;
        const int64_t at = group(j) * job.stride + row;
        const F first = round_half(codec, job, at, u[j], w[j][0], codes + j * PANEL, 0, loss);
        const F second = round_half(codec, job, at + LANES, u[j], w[j][1], codes + j * PANEL + LANES, PARTS > 1, loss);
        put(tile + j * PANEL, first), put(tile + j * PANEL + LANES, second);
#pragma GCC unroll 16
        for (int k = j + 1; k < N; k++)
            w[k][0] = minus_product(first, u[k] - F{}, w[k][0]), w[k][1] = minus_product(second, u[k] - F{}, w[k][1]);
    }
}

// The columns of a leaf in one panel, `packed` being the factor's rows and columns of the leaf.
template <class Codec>
void round_leaf(Codec codec, const Columns& job, int64_t start, int64_t stop, int64_t row, const float* packed, float* leaf, uint8_t* codes,
                Squares& loss) {
    const int64_t width = stop - start;
    if (job.group_size) make_grid(codec, job, leaf, width, start / job.group_size, row);
    for (int64_t left = 0; left < width;) {
        const int64_t n = width - left >= TILE ? TILE : 1, within = left % TILE, right = left + n;
        float* tile = leaf + left * PANEL;
        const float* diagonal = packed + (left - within) * width + left * TILE + within;
        const auto group = [&](int64_t j) { return job.group_size ? start / job.group_size : job.group_of[start + left + j]; };
        if (n == TILE) round_tile<TILE>(codec, job, group, row, diagonal, tile, codes + left * PANEL, loss);
        else round_tile<1>(codec, job, group, row, diagonal, tile, codes + left * PANEL, loss);
        if (n == 1) take_some(std::min(TILE - within - 1, width - right), tile, diagonal + 1, 1, leaf + right * PANEL);
        else
            for (int64_t k = right; k < width; k += TILE) take_some(width - k, tile, packed + k * width + left * TILE, n, leaf + k * PANEL);
        left = right;
    }
}

template <class Codec> void columns(Codec codec, const Columns& job, int threads) {
    const int64_t panels = (job.rows + PANEL - 1) / PANEL, leaf = job.group_size ? job.group_size : LEAF;
    const int64_t together = std::clamp<int64_t>(
        (panels + threads - 1) / threads, 1, std::clamp<int64_t>(CACHE / (job.columns * PANEL * 4), TOGETHER / 4, TOGETHER));
    const int64_t most = std::max(leaf, LEAF), stride = job.columns * PANEL;
    parallel((panels + together - 1) / together, threads, [&](int64_t task) {
        const int64_t first = task * together, count = std::min(together, panels - first);
        std::vector<F> aligned(count * stride / LANES);  // zeros, which is what rows beyond the last one hold
        float* const memory = reinterpret_cast<float*>(aligned.data());
        std::vector<float> packed(most * (leaf + TILE));
        std::vector<uint8_t> codes(leaf * PANEL);
        std::vector<Squares> losses(count);
        for (int64_t start = 0; start < job.columns; start += leaf) {
            const int64_t stop = std::min(start + leaf, job.columns), width = stop - start;
            for (int64_t row = first * PANEL; row < std::min((first + count) * PANEL, job.rows); row++) {
                float* to = memory + (row / PANEL - first) * stride + start * PANEL + row % PANEL;
                for (int64_t k = 0; k < width; k++) to[k * PANEL] = job.weight[row * job.columns + start + k];
            }
            for (int64_t top = 0; top < start; top += LEAF) {
                const int64_t bottom = std::min(top + LEAF, start);
                pack(job, top, bottom, stop, start, stop, packed.data());
                for (int64_t p = 0; p < count; p++)
                    for (int64_t k = 0; k < width; k += TILE)
                        take_some(width - k, memory + p * stride + top * PANEL, packed.data() + k * (bottom - top), bottom - top,
                                  memory + p * stride + (start + k) * PANEL);
            }
            pack(job, start, stop, stop, start, stop, packed.data());
            for (int64_t p = 0; p < count; p++) {
                const int64_t row = (first + p) * PANEL;
                if constexpr (masked<Codec>)
                    for (int64_t r = 0; r < std::min(PANEL, job.rows - row); r++)
                        for (int64_t k = 0; k < width; k++) codes[k * PANEL + r] = job.mask[(row + r) * job.columns + start + k];
                round_leaf(codec, job, start, stop, row, packed.data(), memory + p * stride + start * PANEL, codes.data(), losses[p]);
                for (int64_t r = 0; r < std::min(PANEL, job.rows - row); r++)
                    for (int64_t k = 0; k < width; k++) job.codes[(row + r) * job.columns + start + k] = codes[k * PANEL + r];
            }
        }
        for (int64_t p = 0; p < count; p++) job.loss[first + p] = losses[p].total();
    });
}

template <class Codec> void columns_of(Codec codec, const Columns& job, int threads) {
    if (job.mask) columns(Masked<Codec>(codec), job, threads);
    else columns(codec, job, threads);
}

}  // namespace

extern "C" int64_t kompressor_panel() { return PANEL; }

// codec: 0 INT symmetric, 1 INT asymmetric, 2 FP8, 3 FP4 (its codes as E4M3). step and zero_point fp32 [groups, stride]: read, or with a
// group_size made here, of columns in their order, and as stored in `dtype`. loss: [panels].
extern "C" void kompressor_gptq(const float* weight, const float* factor, int64_t rows, int64_t columns_, int codec, int bits, float* step,
                                float* zero_point, int64_t stride, const int32_t* group_of, int64_t group_size, int dtype,
                                const uint8_t* mask, int threads, uint8_t* codes, double* loss) {
    const Columns job{weight, factor, rows, columns_, stride, step, zero_point, group_of, group_size, step, zero_point, dtype, codes, loss, mask};
    Job format{};
    format.bits = bits, format.bias = 0;
    switch (codec) {
        case 0: return columns_of(Symmetric(format), job, threads);
        case 1: return columns_of(Asymmetric(format), job, threads);
        case 2: return columns_of(Fp8(format), job, threads);
        case 3: return columns_of(Fp4InFp8(format), job, threads);
    }
}
