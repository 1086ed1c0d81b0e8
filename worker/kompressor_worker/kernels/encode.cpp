// Codes that a pass chose, to what the file holds and what they cost; and the file to the weight that a reader sees. The specification is
// `eager.pack`, `eager.code_errors` and `eager.dequantize`.

namespace {

struct Codes {
    const uint8_t* codes;  // [rows, columns]: int8, or E4M3
    int64_t rows, columns;
};

inline F code_value(const uint8_t* codes, int64_t count, bool floating) {
    B bytes{};
    if (count >= LANES) std::memcpy(&bytes, codes, LANES);
    else std::memcpy(&bytes, codes, count);
    const U wide = widen(bytes);
    return floating ? fp8_to_float(wide) : __builtin_convertvector(cast<I>(wide << 24) >> 24, F);
}

template <int T>
void code_errors(const Codes& job, bool floating, const char* weight, const float* step, const float* zero_point, int64_t height,
                 int64_t wide, int threads, double* stats) {
    const int64_t tiles = (job.columns + wide - 1) / wide;
    const int64_t together = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(job.columns, 1));
    std::vector<double> sums(2 * job.rows);
    parallel((job.rows + together - 1) / together, threads, [&](int64_t task) {
        for (int64_t row = task * together; row < std::min(job.rows, (task + 1) * together); row++) {
            Squares errors, squares;
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t at = row / height * tiles + t, stop = std::min((t + 1) * wide, job.columns);
                const F s = splat(step[at]), z = splat(zero_point ? zero_point[at] : 0.0f);
                for (int64_t i = t * wide; i < stop; i += LANES) {
                    const int64_t n = std::min(LANES, stop - i), place = row * job.columns + i;
                    const char* p = weight + place * width<T>();
                    const F x = n == LANES ? load<T>(p) : load_some<T>(p, n);
                    F error = (code_value(job.codes + place, n, floating) - z) * s - x;
                    for (int64_t k = n; k < LANES; k++) error[k] = 0;  // a zero point is not zero
                    errors.add(error, i / LANES % PARTS), squares.add(x, i / LANES % PARTS);
                }
            }
            sums[2 * row] = errors.total(), sums[2 * row + 1] = squares.total();
        }
    });
    stats[0] = stats[1] = 0;
    for (int64_t row = 0; row < job.rows; row++) stats[0] += sums[2 * row], stats[1] += sums[2 * row + 1];
}

enum Held { INTEGERS = 0, E4M3 = 1, WORDS = 2, E2M1_PAIRS = 3 };

// One row's codes, a byte each: integers without their offset, E4M3, or the nibbles of E2M1.
void unpack(const uint8_t* packed, int held, int bits, int64_t columns, uint8_t* codes) {
    if (held == E2M1_PAIRS) {
        for (int64_t i = 0; i < columns / 2; i++) codes[2 * i] = packed[i] & 15, codes[2 * i + 1] = packed[i] >> 4;
        return;
    }
    const uint8_t offset = 1 << (bits - 1), mask = (1 << bits) - 1;
    if (bits == 4) {
        int64_t i = 0;
        for (; i < columns / 2; i++) codes[2 * i] = (packed[i] & 15) - 8, codes[2 * i + 1] = (packed[i] >> 4) - 8;
        if (columns % 2) codes[columns - 1] = (packed[i] & 15) - 8;
        return;
    }
    for (int64_t i = 0; i < columns; i += 8, packed += bits) {
        uint64_t eight = 0;
        const int64_t count = std::min<int64_t>(8, columns - i);
        std::memcpy(&eight, packed, count == 8 ? bits : (count * bits + 7) / 8);
        for (int64_t k = 0; k < count; k++) codes[i + k] = ((eight >> (k * bits)) & mask) - offset;
    }
}

template <int T>
void dequantize(const uint8_t* held_codes, int64_t stride, int held, int bits, int64_t rows, int64_t columns, const float* step,
                const float* zero_point, int64_t height, int64_t wide, int threads, char* made) {
    const int64_t tiles = (columns + wide - 1) / wide, together = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(columns, 1));
    parallel((rows + together - 1) / together, threads, [&](int64_t task) {
        std::vector<uint8_t> unpacked(columns);
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++) {
            const uint8_t* codes = held_codes + row * stride;
            if (held == WORDS || held == E2M1_PAIRS) unpack(codes, held, bits, columns, unpacked.data()), codes = unpacked.data();
            char* line = made + row * columns * width<T>();
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t at = row / height * tiles + t, stop = std::min((t + 1) * wide, columns);
                const F s = splat(step[at]), z = splat(zero_point ? zero_point[at] : 0.0f);
                for (int64_t i = t * wide; i < stop; i += LANES) {
                    const int64_t n = std::min(LANES, stop - i);
                    F value;
                    if (held == E2M1_PAIRS) {
                        B bytes{};
                        std::memcpy(&bytes, codes + i, n);
                        value = fp4_to_float(widen(bytes));
                    } else {
                        value = code_value(codes + i, n, held == E4M3);
                    }
                    store<T>(line + i * width<T>(), (zero_point ? value - z : value) * s, n);
                }
            }
        }
    });
}

}  // namespace

// bits < 8: integers, as pack-quantized stores them; bits = 4 and floating: E2M1 by pairs, from their E4M3 codes.
extern "C" void kompressor_pack(const uint8_t* codes, int64_t rows, int64_t columns, int bits, int floating, int threads, uint8_t* packed,
                                int64_t stride) {
    uint8_t table[256];
    for (int code = 0; code < 256; code++) {
        const int magnitude = code & 0x7f;  // 0.5 is 0x30 in E4M3; from 1 (0x38) on every fourth code is in E2M1, too
        const int nibble = magnitude < 0x30 ? 0 : magnitude < 0x38 ? 1 : (magnitude - 0x38) / 4 + 2;
        table[code] = uint8_t(nibble | (code >> 7) << 3);
    }
    const int64_t together = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(columns, 1));
    parallel((rows + together - 1) / together, threads, [&](int64_t task) {
        std::vector<uint8_t> row(columns);
        for (int64_t r = task * together; r < std::min(rows, (task + 1) * together); r++) {
            const uint8_t* from = codes + r * columns;
            if (floating)
                for (int64_t i = 0; i < columns; i++) row[i] = table[from[i]];
            else
                for (int64_t i = 0; i < columns; i++) row[i] = uint8_t(from[i] + (1 << (bits - 1)));
            if (bits == 4) pack_nibbles(row.data(), columns, packed + r * stride, stride);
            else pack_bits(row.data(), columns, bits, packed + r * stride, stride);
        }
    });
}

// stats: sum of (dequantised - weight)^2, sum of weight^2. step and zero_point fp32, of tiles of height by wide.
extern "C" void kompressor_code_errors(const uint8_t* codes, int floating, const void* weight, int dtype, int64_t rows, int64_t columns,
                                       const float* step, const float* zero_point, int64_t height, int64_t wide, int threads,
                                       double* stats) {
    const Codes job{codes, rows, columns};
    const char* w = static_cast<const char*>(weight);
    if (dtype == BF16) code_errors<BF16>(job, floating, w, step, zero_point, height, wide, threads, stats);
    if (dtype == FP16) code_errors<FP16>(job, floating, w, step, zero_point, height, wide, threads, stats);
    if (dtype == FP32) code_errors<FP32>(job, floating, w, step, zero_point, height, wide, threads, stats);
}

// held: 0 int8, 1 E4M3, 2 words of `bits` each, 3 pairs of E2M1; stride: bytes of a row of them. made [rows, columns].
extern "C" void kompressor_dequantize(const uint8_t* codes, int64_t stride, int held, int bits, int64_t rows, int64_t columns,
                                      const float* step, const float* zero_point, int64_t height, int64_t wide, int dtype, int threads,
                                      void* made) {
    prefer_huge_pages(made, rows * columns * (dtype == FP32 ? 4 : 2));
    char* to = static_cast<char*>(made);
    if (dtype == BF16) dequantize<BF16>(codes, stride, held, bits, rows, columns, step, zero_point, height, wide, threads, to);
    if (dtype == FP16) dequantize<FP16>(codes, stride, held, bits, rows, columns, step, zero_point, height, wide, threads, to);
    if (dtype == FP32) dequantize<FP32>(codes, stride, held, bits, rows, columns, step, zero_point, height, wide, threads, to);
}
