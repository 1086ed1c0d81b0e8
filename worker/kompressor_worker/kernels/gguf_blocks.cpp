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

typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Bytes bytes_at(const uint8_t* p) {
    Bytes made;
    std::memcpy(&made, p, sizeof made);
    return made;
}

// Planes as `gguf_types.Plane` has them; `position`: of their bits in a code.
template <int bits, int width, int position> struct CodeBits {
    static constexpr uint8_t mask = (1 << bits) - 1;
    static void read(const uint8_t* p, int64_t block, uint8_t* codes) {
        for (int64_t at = 0; at < block; at += 8 / bits * width, p += width)
            for (int shift = 0; shift < 8; shift += bits)
                for (int64_t j = 0; j < width; j += 16) {
                    uint8_t* to = codes + at + shift / bits * width + j;
                    const Bytes part = (bytes_at(p + j) >> shift & mask) << position, both = position ? bytes_at(to) | part : part;
                    std::memcpy(to, &both, sizeof both);
                }
    }
    static void write(uint8_t* p, int64_t block, const uint8_t* codes) {
        for (int64_t at = 0; at < block; at += 8 / bits * width, p += width)
            for (int64_t j = 0; j < width; j += 16) {
                Bytes held{};
                for (int shift = 0; shift < 8; shift += bits)
                    held |= (bytes_at(codes + at + shift / bits * width + j) >> position & mask) << shift;
                std::memcpy(p + j, &held, sizeof held);
            }
    }
};

template <int position> struct CodeBits<1, 1, position> {  // eight neighbours in a byte
    static void read(const uint8_t* p, int64_t block, uint8_t* codes) {
        for (int64_t i = 0; i < block; i++) codes[i] |= (p[i / 8] >> i % 8 & 1) << position;
    }
    static void write(uint8_t* p, int64_t block, const uint8_t* codes) {
        for (int64_t at = 0; at < block; at += 8) {
            uint64_t eight;
            std::memcpy(&eight, codes + at, 8);
            p[at / 8] = uint8_t((eight >> position & 0x0101010101010101u) * 0x0102040810204080u >> 56);
        }
    }
};

template <int position> struct CodeBits<8, 32, position> {  // signed bytes, of whose places the first is -128
    static void read(const uint8_t* p, int64_t block, uint8_t* codes) { write(codes, block, p); }
    static void write(uint8_t* p, int64_t block, const uint8_t* codes) {
        for (int64_t i = 0; i < block; i += 16) {
            const Bytes turned = bytes_at(codes + i) ^ uint8_t(0x80);
            std::memcpy(p + i, &turned, sizeof turned);
        }
    }
};

// visit(bits, where): the planes that there are, first to last, with all that is known of them known when they are compiled.
template <class Visit> inline void each_plane(const GgufKind& kind, Visit visit) {
    const auto is = [&](int i, int bits, int width) { return kind.plane[i][1] == bits && kind.plane[i][2] == width; };
    const int first = kind.plane[0][0], second = kind.plane[1][0];
    if (is(0, 8, 32)) visit(CodeBits<8, 32, 0>(), first);
    else if (is(0, 4, 16)) visit(CodeBits<4, 16, 0>(), first);
    else if (is(0, 4, 32)) visit(CodeBits<4, 32, 0>(), first);
    else if (is(0, 4, 64)) visit(CodeBits<4, 64, 0>(), first);
    else visit(CodeBits<2, 32, 0>(), first);
    if (kind.planes < 2) return;
    if (is(1, 2, 32)) visit(CodeBits<2, 32, 4>(), second);
    else if (is(1, 1, 1)) visit(CodeBits<1, 1, 4>(), second);
    else if (is(0, 4, 32)) visit(CodeBits<1, 32, 4>(), second);
    else visit(CodeBits<1, 32, 2>(), second);
}

// Places among the levels.
inline void read_codes(const uint8_t* p, const GgufKind& kind, uint8_t* codes) {
    each_plane(kind, [&](auto bits, int at) { bits.read(p + at, kind.block, codes); });
}

inline void write_codes(uint8_t* p, const GgufKind& kind, const uint8_t* codes) {
    each_plane(kind, [&](auto bits, int at) { bits.write(p + at, kind.block, codes); });
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
