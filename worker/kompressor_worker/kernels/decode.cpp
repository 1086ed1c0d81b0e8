// Reading: FP8 blocks and MXFP4 experts to bf16, fp16 or fp32; the largest magnitude, and what is not finite.

namespace {

// E4M3 to fp32, exactly; 0x7f and 0xff are NaN.
inline F fp8_to_float(U code) {
    const U magnitude = code & 0x7fu;
    const U normal = (magnitude << 20) + (120u << 23);
    const U subnormal = cast<U>(__builtin_convertvector(cast<I>(magnitude), F) * 0x1p-9f);
    U bits = magnitude < 8u ? subnormal : normal;
    bits = magnitude == 0x7fu ? usplat(0x7fc00000u) : bits;
    return cast<F>(bits | ((code & 0x80u) << 24));
}

template <int T> void decode_fp8(const uint8_t* weight, const float* scale, int64_t rows, int64_t columns, int64_t height, int64_t wide,
                                 int threads, char* out) {
    const int64_t tiles = (columns + wide - 1) / wide, together = std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(columns, 1));
    parallel((rows + together - 1) / together, threads, [&](int64_t task) {
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++) {
            const uint8_t* codes = weight + row * columns;
            char* line = out + row * columns * width<T>();
            for (int64_t t = 0; t < tiles; t++) {
                const F step = splat(scale[row / height * tiles + t]);
                const int64_t stop = std::min((t + 1) * wide, columns);
                for (int64_t i = t * wide; i < stop; i += LANES) {
                    const int64_t n = std::min(LANES, stop - i);
                    B bytes{};
                    if (n == LANES) std::memcpy(&bytes, codes + i, LANES);
                    else std::memcpy(&bytes, codes + i, n);
                    const F f = fp8_to_float(widen(bytes)) * step;
                    if (n == LANES) store<T>(line + i * width<T>(), f);
                    else store<T>(line + i * width<T>(), f, n);
                }
            }
        }
    });
}

// E2M1 nibbles to fp32, exactly.
inline F fp4_to_float(U code) {
    const U magnitude = code & 7u;
    const U bits = magnitude < 2u ? magnitude * 0x3f000000u : (magnitude << 22) + (126u << 23);
    return cast<F>(bits | ((code & 8u) << 28));
}

// 32 rows of one group at a time: its bytes are turned on their side, then every column is decoded as a whole cache line.
template <int T> void decode_experts(const uint8_t* blocks, const uint8_t* scales, int64_t experts, int64_t rows, int64_t groups,
                                     int threads, char* out) {
    constexpr int64_t SIDE = 32, W = width<T>();
    const int64_t bands = (rows + SIDE - 1) / SIDE;
    parallel(experts * bands, threads, [&](int64_t task) {
        const int64_t expert = task / bands, top = task % bands * SIDE, count = std::min(SIDE, rows - top);
        uint8_t turned[16][SIDE] = {}, exponent[SIDE] = {};
        for (int64_t group = 0; group < groups; group++) {
            for (int64_t row = 0; row < count; row++) {
                const int64_t at = (expert * rows + top + row) * groups + group;
                exponent[row] = scales[at];
                for (int64_t byte = 0; byte < 16; byte++) turned[byte][row] = blocks[at * 16 + byte];
            }
            char* column = out + ((expert * groups + group) * 32 * rows + top) * W;
            for (int64_t byte = 0; byte < 16; byte++, column += 2 * rows * W)
                for (int64_t half = 0; half < SIDE; half += LANES) {
                    const int64_t n = std::min(LANES, count - half);
                    if (n <= 0) break;
                    B pairs, powers;
                    std::memcpy(&pairs, turned[byte] + half, sizeof pairs), std::memcpy(&powers, exponent + half, sizeof powers);
                    const U pair = widen(pairs), power = widen(powers);
                    const F step = cast<F>(power == 0u ? usplat(1u << 22) : power << 23);
                    const F low = fp4_to_float(pair & 15u) * step, high = fp4_to_float(pair >> 4) * step;
                    char* p = column + half * W;
                    if (n == LANES) store<T>(p, low), store<T>(p + rows * W, high);
                    else store<T>(p, low, n), store<T>(p + rows * W, high, n);
                }
        }
    });
}

// Magnitudes compare as their bits do.
template <class Word, int lanes> Word largest(const Word* p, int64_t count, Word mask) {
    typedef Word V __attribute__((vector_size(64)));
    V best[4] = {};
    int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes)
        for (int k = 0; k < 4; k++) {
            V v;
            std::memcpy(&v, p + i + k * lanes, sizeof v);
            v &= mask;
            best[k] = v > best[k] ? v : best[k];
        }
    Word most = 0;
    for (auto& part : best)
        for (int j = 0; j < lanes; j++) most = std::max<Word>(most, part[j]);
    for (; i < count; i++) most = std::max<Word>(most, p[i] & mask);
    return most;
}

template <class Word, int lanes> void range(const Word* p, int64_t count, Word infinity, int threads, uint32_t* amax, int64_t* nonfinite) {
    constexpr int64_t CHUNK = 1 << 19;
    const Word mask = Word(Word(~Word(0)) >> 1);
    std::vector<Word> most((count + CHUNK - 1) / CHUNK);
    std::atomic<int64_t> bad{0};
    parallel(int64_t(most.size()), threads, [&](int64_t chunk) {
        const Word* part = p + chunk * CHUNK;
        const int64_t n = std::min(CHUNK, count - chunk * CHUNK);
        most[chunk] = largest<Word, lanes>(part, n, mask);
        if (most[chunk] < infinity) return;
        most[chunk] = 0;
        for (int64_t i = 0; i < n; i++) {
            const Word magnitude = part[i] & mask;
            if (magnitude >= infinity) bad++;
            else most[chunk] = std::max(most[chunk], magnitude);
        }
    });
    *amax = 0;
    for (Word word : most) *amax = std::max<uint32_t>(*amax, word);
    *nonfinite = bad;
}

}  // namespace

extern "C" void kompressor_decode_fp8_block(const uint8_t* weight, const float* scale, int64_t rows, int64_t columns, int64_t height,
                                            int64_t wide, int dtype, int threads, void* out) {
    prefer_huge_pages(out, rows * columns * (dtype == FP32 ? 4 : 2));
    char* p = static_cast<char*>(out);
    if (dtype == BF16) decode_fp8<BF16>(weight, scale, rows, columns, height, wide, threads, p);
    if (dtype == FP16) decode_fp8<FP16>(weight, scale, rows, columns, height, wide, threads, p);
    if (dtype == FP32) decode_fp8<FP32>(weight, scale, rows, columns, height, wide, threads, p);
}

extern "C" void kompressor_decode_mxfp4(const uint8_t* blocks, const uint8_t* scales, int64_t experts, int64_t rows, int64_t groups,
                                        int dtype, int threads, void* out) {
    prefer_huge_pages(out, experts * rows * groups * 32 * (dtype == FP32 ? 4 : 2));
    char* p = static_cast<char*>(out);
    if (dtype == BF16) decode_experts<BF16>(blocks, scales, experts, rows, groups, threads, p);
    if (dtype == FP16) decode_experts<FP16>(blocks, scales, experts, rows, groups, threads, p);
    if (dtype == FP32) decode_experts<FP32>(blocks, scales, experts, rows, groups, threads, p);
}

// The bits of the largest finite magnitude, in the tensor's own dtype, and how many elements are NaN or Inf.
extern "C" void kompressor_range(const void* data, int dtype, int64_t count, int threads, uint32_t* amax, int64_t* nonfinite) {
    if (dtype == FP32) return range<uint32_t, 16>(static_cast<const uint32_t*>(data), count, 0x7f800000u, threads, amax, nonfinite);
    const uint16_t infinity = dtype == BF16 ? 0x7f80 : 0x7c00;
    range<uint16_t, 32>(static_cast<const uint16_t*>(data), count, infinity, threads, amax, nonfinite);
}
