// GGUF's blocks, one after the other as they lie in memory: read, decoded, priced, and given other codes. The specification is
// `formats.gguf_packing` and `gguf_eager`.

namespace {

enum Small { NONE = 0, NIBBLES = 1, SIX = 2, SIGNED_SIX = 3, BYTES = 4 };

// `formats.gguf_types.GgufType`; -1 where it has nothing.
struct GgufKind {
    int32_t block, nbytes, group, bits, planes, plane[2][3], scale, minimum, small, small_at, exponent, even;
    float small_bottom, small_top, levels[16];  // even levels: the first and the last
};

constexpr int64_t WIDEST = 256, MOST_GROUPS = 16;

inline float half_at(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t magnitude = h & 0x7fffu, sign = uint32_t(h & 0x8000u) << 16;
    if (magnitude < 0x400u) return cast<float>(cast<uint32_t>(float(int(magnitude)) * 0x1p-24f) | sign);
    return cast<float>((magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : (magnitude << 13) + (112u << 23)) | sign);
}

// 2^(exponent - 128): MXFP4's levels are doubled
inline float half_exponent(uint32_t e) { return cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23); }

// What a block's groups are multiplied by, and what is taken away.
struct GroupScales {
    float step[MOST_GROUPS], low[MOST_GROUPS];
};

inline void group_scales(const uint8_t* p, const GgufKind& kind, GroupScales& out) {
    const int64_t groups = kind.block / kind.group;
    if (kind.exponent) {
        out.step[0] = half_exponent(*p);
        return;
    }
    const float scale = half_at(p + kind.scale), least = kind.minimum < 0 ? 0.0f : half_at(p + kind.minimum);
    const uint8_t* s = p + kind.small_at;
    for (int64_t g = 0; g < groups; g++) {
        switch (kind.small) {
            case NONE: out.step[g] = scale, out.low[g] = -least; break;
            case NIBBLES: out.step[g] = scale * float(s[g] & 15), out.low[g] = least * float(s[g] >> 4); break;
            case BYTES: out.step[g] = scale * float(int8_t(s[g])); break;
            case SIGNED_SIX: {
                const int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
                out.step[g] = scale * float((low | high << 4) - 32);
                break;
            }
            case SIX: {
                const int h = g % 4, small = g < 4 ? s[h] & 63 : (s[8 + h] & 15) | s[h] >> 6 << 4;
                const int small_low = g < 4 ? s[4 + h] & 63 : s[8 + h] >> 4 | s[4 + h] >> 6 << 4;
                out.step[g] = scale * float(small), out.low[g] = least * float(small_low);
            }
        }
    }
}

template <int bits, int width> inline void read_plane(const uint8_t* p, int64_t block, int position, uint8_t* codes) {
    for (int64_t at = 0; at < block; at += 8 / bits * width, p += width)
        for (int shift = 0; shift < 8; shift += bits)
            for (int64_t j = 0; j < width; j++) codes[at + shift / bits * width + j] |= (p[j] >> shift & ((1 << bits) - 1)) << position;
}

template <int bits, int width> inline void write_plane(uint8_t* p, int64_t block, int position, const uint8_t* codes) {
    for (int64_t at = 0; at < block; at += 8 / bits * width, p += width) {
        uint8_t held[width] = {};
        for (int shift = 0; shift < 8; shift += bits)
            for (int64_t j = 0; j < width; j++) held[j] |= (codes[at + shift / bits * width + j] >> position & ((1 << bits) - 1)) << shift;
        std::memcpy(p, held, width);
    }
}

// The planes that there are, with their widths known when they are compiled.
template <class Visit> inline void each_plane(const GgufKind& kind, Visit visit) {
    int position = 0;
    for (int i = 0; i < kind.planes; i++) {
        const int32_t *plane = kind.plane[i], at = plane[0], bits = plane[1], width = plane[2];
        if (bits == 4 && width == 16) visit(std::integral_constant<int, 4>(), std::integral_constant<int, 16>(), at, position);
        else if (bits == 4 && width == 32) visit(std::integral_constant<int, 4>(), std::integral_constant<int, 32>(), at, position);
        else if (bits == 4 && width == 64) visit(std::integral_constant<int, 4>(), std::integral_constant<int, 64>(), at, position);
        else if (bits == 2 && width == 32) visit(std::integral_constant<int, 2>(), std::integral_constant<int, 32>(), at, position);
        else if (bits == 1 && width == 32) visit(std::integral_constant<int, 1>(), std::integral_constant<int, 32>(), at, position);
        else if (bits == 1 && width == 1) visit(std::integral_constant<int, 1>(), std::integral_constant<int, 1>(), at, position);
        else if (bits == 8 && width == 32) visit(std::integral_constant<int, 8>(), std::integral_constant<int, 32>(), at, position);
        position += bits;
    }
}

// Places among the levels. A byte is a signed number, of whose places the first is -128.
inline void read_codes(const uint8_t* p, const GgufKind& kind, uint8_t* codes) {
    std::memset(codes, 0, kind.block);
    each_plane(kind, [&](auto bits, auto width, int at, int position) {
        read_plane<decltype(bits)::value, decltype(width)::value>(p + at, kind.block, position, codes);
    });
    if (kind.bits == 8)
        for (int64_t i = 0; i < kind.block; i++) codes[i] ^= 0x80;
}

inline void write_codes(uint8_t* p, const GgufKind& kind, const uint8_t* codes) {
    uint8_t bytes[WIDEST];
    for (int64_t i = 0; i < kind.block; i++) bytes[i] = kind.bits == 8 ? codes[i] ^ 0x80 : codes[i];
    each_plane(kind, [&](auto bits, auto width, int at, int position) {
        write_plane<decltype(bits)::value, decltype(width)::value>(p + at, kind.block, position, bytes);
    });
}

// A block's values, fp32.
inline void decode_block(const uint8_t* p, const GgufKind& kind, float* values) {
    uint8_t codes[WIDEST];
    GroupScales scales;
    read_codes(p, kind, codes);
    group_scales(p, kind, scales);
    const bool minima = kind.minimum >= 0;
    for (int64_t g = 0, at = 0; at < kind.block; g++)
        for (const int64_t stop = at + kind.group; at < stop; at += LANES) {
            F level;
            if (kind.even) {
                B bytes;
                std::memcpy(&bytes, codes + at, sizeof bytes);
                level = __builtin_convertvector(cast<I>(widen(bytes)), F) + splat(kind.levels[0]);
            } else {
                for (int64_t i = 0; i < LANES; i++) level[i] = kind.levels[codes[at + i]];
            }
            const F value = level * scales.step[g], lowered = minima ? value - scales.low[g] : value;  // -0 stays: no splat
            std::memcpy(values + at, &lowered, sizeof lowered);
        }
}

// Rows of whole blocks in pieces for threads: visit(row, block in the row, the block's bytes).
template <class Visit> void each_block(const uint8_t* data, int64_t rows, int64_t blocks, const GgufKind& kind, int threads, Visit visit) {
    const int64_t together = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, blocks * kind.block));
    parallel((rows + together - 1) / together, threads, [&](int64_t task) {
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++)
            for (int64_t b = 0; b < blocks; b++) visit(row, b, data + (row * blocks + b) * kind.nbytes);
    });
}

template <int T> void gguf_decode(const uint8_t* data, const GgufKind& kind, int64_t rows, int64_t blocks, int threads, char* out) {
    each_block(data, rows, blocks, kind, threads, [&](int64_t row, int64_t b, const uint8_t* p) {
        float values[WIDEST];
        decode_block(p, kind, values);
        char* to = out + (row * blocks + b) * kind.block * width<T>();
        for (int64_t i = 0; i < kind.block; i += LANES) store<T>(to + i * width<T>(), load<FP32>(reinterpret_cast<char*>(values + i)));
    });
}

template <int T>
void gguf_errors(const char* weight, const uint8_t* data, const GgufKind& kind, int64_t rows, int64_t blocks, int threads, double* sums) {
    each_block(data, rows, blocks, kind, threads, [&](int64_t row, int64_t b, const uint8_t* p) {
        float values[WIDEST];
        decode_block(p, kind, values);
        const char* from = weight + (row * blocks + b) * kind.block * width<T>();
        Squares errors, squares;
        for (int64_t i = 0; i < kind.block; i += STEP)
            for (int64_t part = 0; part < PARTS; part++) {
                const int64_t at = i + part * LANES;
                const F x = load<T>(from + at * width<T>());
                errors.add(load<FP32>(reinterpret_cast<char*>(values + at)) - x, part), squares.add(x, part);
            }
        sums[2 * row] += errors.total(), sums[2 * row + 1] += squares.total();
    });
}

}  // namespace

extern "C" void kompressor_gguf_dequantize(const uint8_t* data, const GgufKind* kind, int64_t rows, int64_t columns, int dtype, int threads,
                                           char* out) {
    const int64_t blocks = columns / kind->block;
    prefer_huge_pages(out, rows * columns * (dtype == FP32 ? 4 : 2));
    if (dtype == BF16) gguf_decode<BF16>(data, *kind, rows, blocks, threads, out);
    if (dtype == FP16) gguf_decode<FP16>(data, *kind, rows, blocks, threads, out);
    if (dtype == FP32) gguf_decode<FP32>(data, *kind, rows, blocks, threads, out);
}

extern "C" void kompressor_gguf_errors(const char* weight, int dtype, const uint8_t* data, const GgufKind* kind, int64_t rows,
                                       int64_t columns, int threads, double* stats) {
    std::vector<double> sums(2 * rows, 0.0);
    const int64_t blocks = columns / kind->block;
    if (dtype == BF16) gguf_errors<BF16>(weight, data, *kind, rows, blocks, threads, sums.data());
    if (dtype == FP16) gguf_errors<FP16>(weight, data, *kind, rows, blocks, threads, sums.data());
    if (dtype == FP32) gguf_errors<FP32>(weight, data, *kind, rows, blocks, threads, sums.data());
    stats[0] = stats[1] = 0;
    for (int64_t row = 0; row < rows; row++) stats[0] += sums[2 * row], stats[1] += sums[2 * row + 1];
}

// Codes with zero in the middle, and scale and centre of each group.
extern "C" void kompressor_gguf_codes(const uint8_t* data, const GgufKind* kind, int64_t rows, int64_t columns, int threads, int8_t* codes,
                                      float* scale, float* centre) {
    const int64_t blocks = columns / kind->block, groups = kind->block / kind->group, middle = 1 << (kind->bits - 1);
    const float lifted = float(middle) + kind->levels[0];
    each_block(data, rows, blocks, *kind, threads, [&](int64_t row, int64_t b, const uint8_t* p) {
        uint8_t places[WIDEST];
        GroupScales scales;
        read_codes(p, *kind, places);
        group_scales(p, *kind, scales);
        const int64_t at = row * blocks + b;
        for (int64_t i = 0; i < kind->block; i++) codes[at * kind->block + i] = int8_t(places[i] - middle);
        for (int64_t g = 0; g < groups; g++) {
            const float raised = scales.step[g] * lifted;
            scale[at * groups + g] = scales.step[g], centre[at * groups + g] = kind->minimum < 0 ? raised : raised - scales.low[g];
        }
    });
}

extern "C" void kompressor_gguf_pack(const int8_t* codes, const GgufKind* kind, int64_t rows, int64_t columns, int threads, uint8_t* data) {
    const int64_t blocks = columns / kind->block, middle = 1 << (kind->bits - 1);
    each_block(data, rows, blocks, *kind, threads, [&](int64_t row, int64_t b, const uint8_t* p) {
        uint8_t places[WIDEST];
        const int8_t* from = codes + (row * blocks + b) * kind->block;
        for (int64_t i = 0; i < kind->block; i++) places[i] = uint8_t(from[i] + middle);
        write_codes(const_cast<uint8_t*>(p), *kind, places);
    });
}
