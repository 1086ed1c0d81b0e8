// Weights by the values that are left of them, and a bit for each place; the specification is `bitmask.py`. Eight places at a time: their
// mask is a byte of the file, and the index of a shuffle.

namespace {

#ifdef __AVX2__
// By mask: which byte of eight 16-bit words goes where, when the marked ones move together, and back apart (0x80: zero).
struct Shuffles {
    alignas(16) uint8_t together[256][16], apart[256][16];
    Shuffles() {
        for (int mask = 0; mask < 256; mask++) {
            std::memset(together[mask], 0x80, 16), std::memset(apart[mask], 0x80, 16);
            for (int place = 0, n = 0; place < 8; place++)
                if (mask >> place & 1) {
                    for (int byte = 0; byte < 2; byte++) {
                        together[mask][2 * n + byte] = uint8_t(2 * place + byte);
                        apart[mask][2 * place + byte] = uint8_t(2 * n + byte);
                    }
                    n++;
                }
        }
    }
};
const Shuffles shuffles;

inline __m128i eight(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void put_eight(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }
#endif

// Which of eight words are not zero.
template <class Word> inline uint32_t marks(const Word* p) {
#ifdef __AVX2__
    if constexpr (sizeof(Word) == 2) {
        const __m128i zero = _mm_cmpeq_epi16(eight(p), _mm_setzero_si128());
        return ~uint32_t(_mm_movemask_epi8(_mm_packs_epi16(zero, zero))) & 0xffu;
    }
#endif
    uint32_t mask = 0;
    for (int i = 0; i < 8; i++) mask |= uint32_t(p[i] != 0) << i;
    return mask;
}

// Writes eight words, of which the first ones are those that the mask marks.
template <class Word> inline void gather(const Word* p, uint32_t mask, Word* out) {
#ifdef __AVX2__
    if constexpr (sizeof(Word) == 2) {
        put_eight(out, _mm_shuffle_epi8(eight(p), eight(shuffles.together[mask])));
        return;
    }
#endif
    int n = 0;
    Word found[8] = {};
    for (int i = 0; i < 8; i++) found[n] = p[i], n += mask >> i & 1;
    std::memcpy(out, found, sizeof found);
}

// Reads eight words; the first ones go to the places that the mask marks, zeros to the others.
template <class Word> inline void scatter(const Word* p, uint32_t mask, Word* out) {
#ifdef __AVX2__
    if constexpr (sizeof(Word) == 2) {
        put_eight(out, _mm_shuffle_epi8(eight(p), eight(shuffles.apart[mask])));
        return;
    }
#endif
    int n = 0;
    for (int i = 0; i < 8; i++) {
        const uint32_t marked = mask >> i & 1;
        out[i] = marked ? p[n] : Word(0), n += marked;
    }
}

// Rows that one thread takes at once.
inline int64_t rows_together(int64_t columns) { return std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(columns, 1)); }

inline uint32_t valid(int64_t places) { return places >= 8 ? 0xffu : (1u << places) - 1; }

// The words from p on, of which `there` exist; zeros after them.
template <class Word> inline const Word* padded(const Word* p, int64_t there, Word* scratch) {
    if (there >= 8) return p;
    std::memset(scratch, 0, 8 * sizeof(Word));
    std::memcpy(scratch, p, there * sizeof(Word));
    return scratch;
}

template <class Word> int64_t zeros_of(const Word* row, int64_t columns) {
    int64_t marked = 0, i = 0;
    for (; i + 8 <= columns; i += 8) marked += __builtin_popcount(marks(row + i));
    for (; i < columns; i++) marked += row[i] != 0;
    return columns - marked;
}

// One row: its first `leave` zeros are left out. `out` may be written up to `stop`. Returns where the next row's values go.
template <class Word> Word* pack_row(const Word* row, int64_t columns, int64_t leave, Word* out, Word* stop, uint8_t* bits) {
    Word scratch[8], some[8];
    for (int64_t i = 0; i < columns; i += 8) {
        const uint32_t places = valid(columns - i);
        const Word* p = padded(row + i, columns - i, scratch);
        uint32_t mask = marks(p) & places, zeros = ~mask & places;
        if (__builtin_popcount(zeros) <= leave) {
            leave -= __builtin_popcount(zeros);
        } else {
            for (; leave; leave--) zeros &= zeros - 1;
            mask |= zeros;
        }
        const int n = __builtin_popcount(mask);
        *bits++ = uint8_t(mask);
        if (stop - out >= 8) {
            gather(p, mask, out);
        } else {
            gather(p, mask, some);
            std::memcpy(out, some, n * sizeof(Word));
        }
        out += n;
    }
    return out;
}

// Returns how many zeros there are; with fewer than are to be left out nothing is written.
template <class Word> int64_t pack_bitmask(const Word* weight, int64_t rows, int64_t columns, int64_t leave, int threads, Word* values,
                                           uint8_t* bitmask, int64_t* offsets) {
    const int64_t together = rows_together(columns), tasks = (rows + together - 1) / together;
    std::vector<int64_t> left(rows);
    parallel(tasks, threads, [&](int64_t task) {
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++)
            left[row] = zeros_of(weight + row * columns, columns);
    });
    int64_t there = 0, next = 0;
    for (int64_t row = 0; row < rows; row++) {
        const int64_t zeros = left[row];
        left[row] = std::clamp<int64_t>(leave - there, 0, zeros);
        there += zeros, offsets[row] = next, next += columns - left[row];
    }
    if (there < leave) return there;
    parallel(tasks, threads, [&](int64_t task) {
        const int64_t first = task * together, last = std::min(rows, first + together);
        Word *out = values + offsets[first], *const stop = values + (last < rows ? offsets[last] : next);
        for (int64_t row = first; row < last; row++)
            out = pack_row(weight + row * columns, columns, left[row], out, stop, bitmask + row * ((columns + 7) / 8));
    });
    return there;
}

template <class Word> int64_t unpack_bitmask(const Word* values, int64_t count, const uint8_t* bitmask, int64_t rows, int64_t columns,
                                             int threads, Word* weight) {
    const int64_t bytes = (columns + 7) / 8, together = rows_together(columns), tasks = (rows + together - 1) / together;
    std::vector<int64_t> begin(rows + 1);
    std::atomic<bool> beside{false};
    parallel(tasks, threads, [&](int64_t task) {
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++) {
            const uint8_t* bits = bitmask + row * bytes;
            int64_t marked = 0;
            for (int64_t i = 0; i < bytes; i++) marked += __builtin_popcount(bits[i]);
            begin[row + 1] = marked;
            if (bytes && bits[bytes - 1] & ~valid(columns - 8 * (bytes - 1))) beside = true;
        }
    });
    for (int64_t row = 0; row < rows; row++) begin[row + 1] += begin[row];
    if (beside || begin[rows] != count) return -1;
    parallel(tasks, threads, [&](int64_t task) {
        Word scratch[8], some[8];
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++) {
            const uint8_t* bits = bitmask + row * bytes;
            const Word* in = values + begin[row];
            Word* out = weight + row * columns;
            for (int64_t i = 0; i < columns; i += 8, bits++) {
                const Word* p = padded(in, values + count - in, scratch);
                if (columns - i >= 8) {
                    scatter(p, *bits, out + i);
                } else {
                    scatter(p, *bits, some);
                    std::memcpy(out + i, some, (columns - i) * sizeof(Word));
                }
                in += __builtin_popcount(*bits);
            }
        }
    });
    return count;
}

}  // namespace

// width: bytes of a value, 2 or 4. Returns how many zeros there are; with fewer than `leave` nothing is written.
extern "C" int64_t kompressor_pack_bitmask(const void* weight, int width, int64_t rows, int64_t columns, int64_t leave, int threads,
                                           void* values, uint8_t* bitmask, int64_t* offsets) {
    prefer_huge_pages(values, (rows * columns - leave) * width);
    if (width == 2)
        return pack_bitmask(static_cast<const uint16_t*>(weight), rows, columns, leave, threads, static_cast<uint16_t*>(values), bitmask, offsets);
    return pack_bitmask(static_cast<const uint32_t*>(weight), rows, columns, leave, threads, static_cast<uint32_t*>(values), bitmask, offsets);
}

// Returns `count`; -1, with nothing written, where the bitmask marks more or fewer places than there are values, or places beside the weight.
extern "C" int64_t kompressor_unpack_bitmask(const void* values, int width, int64_t count, const uint8_t* bitmask, int64_t rows,
                                             int64_t columns, int threads, void* weight) {
    prefer_huge_pages(weight, rows * columns * width);
    if (width == 2)
        return unpack_bitmask(static_cast<const uint16_t*>(values), count, bitmask, rows, columns, threads, static_cast<uint16_t*>(weight));
    return unpack_bitmask(static_cast<const uint32_t*>(values), count, bitmask, rows, columns, threads, static_cast<uint32_t*>(weight));
}
