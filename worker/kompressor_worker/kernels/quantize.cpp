// A weight [rows, columns] to codes, scales and errors, each strip of it read from memory once.
// The specification is `grid.py`; what each step must equal there is said beside it.

namespace {

constexpr float MAGIC = 0x1.8p23f;  // added and taken away: rounds to an integer, ties to even; the integer is in its low bits
constexpr float ZERO_SCALE = 0x1p-23f;

struct Job {
    const char* weight;
    int64_t rows, columns, tile_rows, tile_columns, tiles;  // tiles: in a row of them
    int bits, bias;                                         // bias: added to every integer code
    float shared;  // what tensors that a loader makes one have in common: NVFP4's global scale, FP8's largest magnitude; 0: nothing
    uint8_t* codes;
    int64_t code_stride;  // bytes a row of codes
    char* scale;          // [row tiles, tiles]
    int8_t* zero_point;   // [rows, tiles] or null
    double *row_error, *row_norm;
    std::atomic<int64_t> nonfinite{0};
};

// What a strip of tiles needs between its three steps: ranges, then the width of one code and the zero point.
struct Tiles {
    std::vector<uint32_t> amax;     // bits of a magnitude in the weight's dtype
    std::vector<int32_t> low, high;  // bits as well, as `Bits::key` orders them
    std::vector<float> step, zero_point;
    explicit Tiles(int64_t count) : amax(count), low(count), high(count), step(count + LANES), zero_point(count + LANES) {}
    void clear() {
        std::fill(amax.begin(), amax.end(), 0u);
        std::fill(low.begin(), low.end(), 0);
        std::fill(high.begin(), high.end(), 0);
    }
};

struct Rounded {
    F value;  // of the code, before the zero point and the scale
    U code;
};

inline F clamp(F x, float low, float high) {
    x = x < splat(low) ? splat(low) : x;
    return x > splat(high) ? splat(high) : x;
}

// An FP format with `mantissa` bits whose smallest normal number is 2^`least`; |x| must not exceed its largest. Ties to even.
template <int mantissa, int least> inline Rounded round_to_float(F x) {
    constexpr int drop = 23 - mantissa;
    constexpr uint32_t one = uint32_t(127 + least) << 23, bias = uint32_t(126 + least) << mantissa;
    const F grid = cast<F>(usplat(uint32_t(127 + least - mantissa + 23) << 23));  // its last bit is the subnormal step
    const U u = cast<U>(x), magnitude = u & 0x7fffffffu;
    const U normal = (magnitude + ((1u << (drop - 1)) - 1) + ((magnitude >> drop) & 1u)) & ~((1u << drop) - 1);
    const F lifted = cast<F>(magnitude) + grid;
    const auto small = magnitude < one;
    const U value = small ? cast<U>(lifted - grid) : normal;
    const U code = small ? cast<U>(lifted) - cast<U>(grid) : (normal >> drop) - bias;
    return {cast<F>(value | (u & 0x80000000u)), code};
}

struct Symmetric {  // grid_of_range, quantize: INT, symmetric
    static constexpr bool asymmetric = false, exact_reciprocal = false;
    float limit, top;
    uint32_t bias;
    explicit Symmetric(const Job& job) : limit(float((1 << job.bits) - 1) / 2), top(float((1 << (job.bits - 1)) - 1)), bias(job.bias) {}
    F scale(F amax) const { return amax / limit; }
    Rounded round(F x) const {
        const F lifted = clamp(x, -top - 1, top) + MAGIC;
        return {lifted - MAGIC, cast<U>(lifted) - (cast<uint32_t>(MAGIC) - bias)};
    }
};

struct Asymmetric : Symmetric {
    static constexpr bool asymmetric = true;
    using Symmetric::Symmetric;
};

struct Fp8 {
    static constexpr bool asymmetric = false, exact_reciprocal = false;
    float shared;
    explicit Fp8(const Job& job) : shared(job.shared) {}
    F scale(F amax) const { return (shared > 0 ? splat(shared) : amax) / 448.0f; }
    Rounded round(F x) const {
        Rounded r = round_to_float<3, -6>(clamp(x, -448, 448));
        r.code |= (cast<U>(x) >> 24) & 0x80u;
        return r;
    }
};

struct Fp4 {
    static constexpr bool asymmetric = false;
    explicit Fp4(const Job&) {}
    Rounded round(F x) const {
        Rounded r = round_to_float<1, 0>(clamp(x, -6, 6));
        r.code |= x < F{} ? usplat(8) : U{};  // -0 itself has no sign here, what rounds to it has
        return r;
    }
};

struct Mxfp4 : Fp4 {
    static constexpr bool exact_reciprocal = true;
    using Fp4::Fp4;
};

struct Nvfp4 : Fp4 {
    static constexpr bool exact_reciprocal = false;
    using Fp4::Fp4;
};

// Sixteen elements as their bits, which compare as magnitudes once the sign is off. Nothing is converted to look for a range.
template <int T> struct Bits {
    typedef std::conditional_t<T == FP32, uint32_t, uint16_t> Word;
    typedef std::make_signed_t<Word> Signed;
    static constexpr int64_t lanes = T == FP32 ? LANES : std::min<int64_t>(2 * LANES, 16);
    typedef Word V __attribute__((vector_size(lanes * sizeof(Word))));
    typedef Signed S __attribute__((vector_size(lanes * sizeof(Word))));
    static constexpr Word mask = Word(~Word(0)) >> 1, infinity = T == FP32 ? 0x7f800000u : T == BF16 ? 0x7f80u : 0x7c00u;
    static V load(const char* p, int64_t count) {
        V v{};
        if (count >= lanes) std::memcpy(&v, p, sizeof v);
        else std::memcpy(&v, p, count * sizeof(Word));
        return v;
    }
    static S key(V v) { return S(v ^ (V(S(v) >> (8 * sizeof(Word) - 1)) & mask)); }  // ordered as the numbers are
    static F value(U word) { return T == FP32 ? cast<F>(word) : T == BF16 ? cast<F>(word << 16) : half_to_float(word); }
    static F value_of_key(I key) { return value(cast<U>(key ^ ((key >> 31) & mask)) & Word(~Word(0))); }
};

template <class V, class Less> inline auto reduce(V v, Less less) {
    auto best = v[0];
    for (size_t i = 1; i < sizeof v / sizeof best; i++) best = less(best, v[i]) ? v[i] : best;
    return best;
}

// Step 1: ranges of the tiles of one row, merged into what the rows above had.
template <int T, bool asymmetric> void scan(const char* p, int64_t columns, int64_t tile, Tiles& tiles, Job& job) {
    using X = Bits<T>;
    for (int64_t t = 0, start = 0; start < columns; t++, start += tile) {
        const int64_t stop = std::min(start + tile, columns);
        typename X::V amax{};
        typename X::S low{}, high{};
        for (int64_t i = start; i < stop; i += X::lanes) {
            const typename X::V v = X::load(p + i * width<T>(), stop - i), magnitude = v & X::mask;
            amax = magnitude > amax ? magnitude : amax;
            if constexpr (asymmetric) {
                const typename X::S key = X::key(v);
                low = key < low ? key : low, high = key > high ? key : high;
            }
        }
        const auto most = reduce(amax, [](auto a, auto b) { return a < b; });
        if (most >= X::infinity)
            for (int64_t i = start; i < stop; i++) job.nonfinite += (X::load(p + i * width<T>(), 1)[0] & X::mask) >= X::infinity;
        tiles.amax[t] = std::max<uint32_t>(tiles.amax[t], most);
        if constexpr (asymmetric) {
            tiles.low[t] = std::min<int32_t>(tiles.low[t], reduce(low, [](auto a, auto b) { return a > b; }));
            tiles.high[t] = std::max<int32_t>(tiles.high[t], reduce(high, [](auto a, auto b) { return a < b; }));
        }
    }
}

// A scale as it is stored in the weight's dtype, in fp32 again.
template <int T> inline F stored(F scale) {
    if constexpr (T == BF16) scale = cast<F>(float_to_bf16(scale) << 16);
    if constexpr (T == FP16) scale = half_to_float(float_to_half(scale));
    return scale == F{} ? splat(ZERO_SCALE) : scale;
}

inline Rounded nvfp4_scale(F amax, float global_scale) {
    const Rounded r = round_to_float<3, -6>(clamp(global_scale * (amax / 6.0f), -448, 448));
    const auto zero = r.code == 0u;
    return {zero ? splat(0.125f) : r.value, zero ? usplat(0x20) : r.code};
}

// Step 2: ranges to scales, written as stored; a vector of tiles at a time.
template <int T, class Codec> void scales(Codec codec, Tiles& tiles, int64_t row_tile, int64_t first, int64_t count, Job& job) {
    const int64_t at = row_tile * job.tiles + first;
    for (int64_t t = 0; t < count; t += LANES) {
        const int64_t n = std::min(LANES, count - t);
        U bits{};
        std::memcpy(&bits, &tiles.amax[t], n * 4);
        const F amax = Bits<T>::value(bits);
        F step;
        if constexpr (std::is_same_v<Codec, Mxfp4>) {
            const U carried = (cast<U>(amax) + (1u << 21)) >> 23;
            const U exponent = carried == 255u ? usplat(255) : (carried < 2u ? U{} : carried - 2u);
            step = cast<F>(exponent == 0u ? usplat(1u << 22) : exponent << 23);
            const B bytes = narrow(exponent);
            std::memcpy(job.scale + at + t, &bytes, n);
        } else if constexpr (std::is_same_v<Codec, Nvfp4>) {
            const Rounded r = nvfp4_scale(amax, job.shared);
            step = r.value / job.shared;
            const B bytes = narrow(r.code);
            std::memcpy(job.scale + at + t, &bytes, n);
        } else {
            F scale;
            if constexpr (Codec::asymmetric) {
                I least{}, most{};
                std::memcpy(&least, &tiles.low[t], n * 4), std::memcpy(&most, &tiles.high[t], n * 4);
                const F low = Bits<T>::value_of_key(least), high = Bits<T>::value_of_key(most);
                const float bottom = -codec.top - 1;
                scale = (high - low) / (codec.top - bottom);
                F zero_point = bottom - low / scale;
                zero_point = zero_point == zero_point ? zero_point : F{};  // 0/0: a tile of zeros
                zero_point = (clamp(zero_point, bottom, codec.top) + MAGIC) - MAGIC;
                std::memcpy(&tiles.zero_point[t], &zero_point, sizeof zero_point);
                for (int64_t j = 0; j < n; j++) job.zero_point[at + t + j] = int8_t(zero_point[j]);
            } else {
                scale = codec.scale(amax);
            }
            step = stored<T>(scale);
            store<T>(job.scale + (at + t) * width<T>(), step, n);
        }
        std::memcpy(&tiles.step[t], &step, sizeof step);
    }
}

// Step 3: codes of one row, a byte each, and the sums of its errors and squares, added to *error and *norm.
template <int T, class Codec>
void emit(Codec codec, const char* p, int64_t columns, int64_t tile, const Tiles& tiles, uint8_t* codes, double* error, double* norm) {
    Squares errors, squares;
    for (int64_t t = 0, start = 0; start < columns; t++, start += tile) {
        const int64_t stop = std::min(start + tile, columns);
        const F step = splat(tiles.step[t]), inverse = 1.0f / step, zero_point = splat(Codec::asymmetric ? tiles.zero_point[t] : 0.0f);
        for (int64_t step_start = start; step_start < stop; step_start += STEP)
#pragma GCC unroll 4
            for (int64_t part = 0; part < PARTS; part++) {
                const int64_t i = step_start + part * LANES, n = stop - i;
                if (n <= 0) break;
                const F x = n >= LANES ? load<T>(p + i * width<T>()) : load_some<T>(p + i * width<T>(), n);
                F y = Codec::exact_reciprocal ? x * inverse : x / step;
                if constexpr (Codec::asymmetric) y = y + zero_point;
                const Rounded r = codec.round(y);
                const B bytes = narrow(r.code);
                if (n >= LANES) std::memcpy(codes + i, &bytes, sizeof bytes);
                else std::memcpy(codes + i, &bytes, n);
                errors.add((Codec::asymmetric ? r.value - zero_point : r.value) * step - x, part), squares.add(x, part);
            }
    }
    *error += errors.total(), *norm += squares.total();
}

// Pairs of codes to bytes, first in the low nibble; what fills the last word up is zero.
void pack_nibbles(const uint8_t* codes, int64_t columns, uint8_t* packed, int64_t stride) {
    typedef uint16_t W __attribute__((vector_size(64)));
    typedef uint8_t N __attribute__((vector_size(32)));
    int64_t i = 0;
    for (; i + 64 <= columns; i += 64) {
        W w;
        std::memcpy(&w, codes + i, sizeof w);
        const N bytes = __builtin_convertvector((w & 0xf) | (w >> 4), N);
        std::memcpy(packed + i / 2, &bytes, sizeof bytes);
    }
    std::memset(packed + i / 2, 0, stride - i / 2);
    for (; i < columns; i++) packed[i / 2] |= codes[i] << (i & 1 ? 4 : 0);
}

// Codes of other widths, densely: eight of them fill `bits` bytes.
void pack_bits(const uint8_t* codes, int64_t columns, int bits, uint8_t* packed, int64_t stride) {
    std::memset(packed, 0, stride);
    for (int64_t i = 0; i < columns; i += 8) {
        uint64_t word = 0;
        for (int64_t j = 0; j < std::min<int64_t>(8, columns - i); j++) word |= uint64_t(codes[i + j]) << (bits * j);
        const int64_t at = i / 8 * bits;
        std::memcpy(packed + at, &word, std::min<int64_t>(bits, stride - at));
    }
}

// Tiles of one row: strips are rows. Tiles of several: strips in panels narrow enough for the cache.
template <int T, class Codec> void run(Codec codec, Job& job, int threads) {
    const int64_t panel = job.tile_rows == 1 ? job.columns : std::max<int64_t>(1, 1024 / job.tile_columns) * job.tile_columns;
    const int64_t strips = (job.rows + job.tile_rows - 1) / job.tile_rows;
    const int64_t together = job.tile_rows == 1 ? std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(job.columns, 1)) : 1;
    parallel((strips + together - 1) / together, threads, [&](int64_t task) {
        Tiles tiles((std::min(panel, job.columns) + job.tile_columns - 1) / job.tile_columns);
        std::vector<uint8_t> unpacked(job.bits < 8 ? job.columns : 0);
        for (int64_t strip = task * together; strip < std::min(strips, (task + 1) * together); strip++) {
            const int64_t top = strip * job.tile_rows, bottom = std::min(top + job.tile_rows, job.rows);
            for (int64_t left = 0; left < job.columns; left += panel) {
                const int64_t columns = std::min(panel, job.columns - left);
                auto source = [&](int64_t row) { return job.weight + (row * job.columns + left) * width<T>(); };
                tiles.clear();
                for (int64_t row = top; row < bottom; row++) scan<T, Codec::asymmetric>(source(row), columns, job.tile_columns, tiles, job);
                scales<T>(codec, tiles, strip, left / job.tile_columns, (columns + job.tile_columns - 1) / job.tile_columns, job);
                for (int64_t row = top; row < bottom; row++) {
                    uint8_t* codes = job.codes + row * job.code_stride;
                    uint8_t* bytes = job.bits < 8 ? unpacked.data() : codes + left;
                    emit<T>(codec, source(row), columns, job.tile_columns, tiles, bytes, job.row_error + row, job.row_norm + row);
                    if (job.bits == 4) pack_nibbles(bytes, columns, codes, job.code_stride);
                    else if (job.bits < 8) pack_bits(bytes, columns, job.bits, codes, job.code_stride);
                    else if (left + columns == job.columns) std::memset(codes + job.columns, 0, job.code_stride - job.columns);
                }
            }
        }
    });
}

template <int T> void dispatch(int codec, Job& job, int threads) {
    switch (codec) {
        case 0: return run<T>(Symmetric(job), job, threads);
        case 1: return run<T>(Asymmetric(job), job, threads);
        case 2: return run<T>(Fp8(job), job, threads);
        case 3: return run<T>(Mxfp4(job), job, threads);
        case 4: return run<T>(Nvfp4(job), job, threads);
    }
}

}  // namespace

// codec: 0 INT symmetric, 1 INT asymmetric, 2 FP8, 3 MXFP4, 4 NVFP4. stats: squared error, squared norm, NaN and Inf.
extern "C" void kompressor_quantize(const void* weight, int dtype, int64_t rows, int64_t columns, int codec, int bits, int bias,
                                    int64_t tile_rows, int64_t tile_columns, float shared, int threads, void* codes,
                                    int64_t code_stride, void* scale, int8_t* zero_point, double* stats) {
    const int64_t tiles = (columns + tile_columns - 1) / tile_columns;
    std::vector<double> sums(2 * rows, 0.0);
    prefer_huge_pages(codes, rows * code_stride);
    Job job{static_cast<const char*>(weight), rows, columns, tile_rows, tile_columns, tiles, bits, bias, shared,
            static_cast<uint8_t*>(codes), code_stride, static_cast<char*>(scale), zero_point, sums.data(), sums.data() + rows};
    if (dtype == BF16) dispatch<BF16>(codec, job, threads);
    if (dtype == FP16) dispatch<FP16>(codec, job, threads);
    if (dtype == FP32) dispatch<FP32>(codec, job, threads);
    stats[0] = stats[1] = 0;
    for (int64_t row = 0; row < rows; row++) stats[0] += job.row_error[row], stats[1] += job.row_norm[row];
    stats[2] = double(job.nonfinite);
}
