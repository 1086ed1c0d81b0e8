// A weight to GGUF's blocks: blocks into lanes, their scales and codes by `gguf_search.cpp`, and the bytes of the file.

namespace {

// visit(column, its group's step, its group's low): of a block.
template <class Visit> inline void each_column(const Panel& p, const GgufKind& kind, Visit visit) {
    for (int64_t g = 0; g < kind.block / kind.group; g++) {
        F step = kind.small == NONE ? p.outer : p.outer * p.small[g], low = kind.small == NONE ? -p.outer_low : p.outer_low * p.least[g];
        if (kind.exponent) step = half_exponents(p.exponent);
        for (int64_t i = g * kind.group; i < (g + 1) * kind.group; i++) visit(i, step, low);
    }
}

// The codes nearest on the scales that were found, and then, where that is wanted, the block's scales larger by its gain.
template <bool weighted, class Levels> inline void round_codes(Panel& p, const GgufKind& kind, const Levels& levels, bool unbiased) {
    const bool minima = kind.minimum >= 0;
    F each{}, along{}, kept{};
    each_column(p, kind, [&](int64_t i, F step, F low) {
        if (i % kind.group == 0) each = inverse(step);
        const F level = levels.round((minima ? p.x[i] + low : p.x[i]) * each), value = level * step, weighed = weighted ? p.w[i] * p.x[i] : p.x[i];
        p.codes[i] = levels.place(level);
        along += weighed * p.x[i], kept += weighed * (minima ? value - low : value);
    });
    if (!unbiased) return;
    F gain = along / kept;
    gain = gain > 0.0f ? gain : splat(1.0f), gain = within(gain, splat(0.5f), splat(2.0f));
    p.outer = as_half(p.outer * gain), p.outer_low = as_half(p.outer_low * gain);
}

// For each lane the sums of (value - x)^2 and of x^2.
template <class Levels> inline void price(const Panel& p, const GgufKind& kind, const Levels& levels, double* error, double* norm) {
    D sums[4] = {};
    each_column(p, kind, [&](int64_t i, F step, F low) {
        const F value = levels.level_at(p.codes[i]) * step, off = (kind.minimum >= 0 ? value - low : value) - p.x[i];
        HalfF halves[2], whole[2];
        std::memcpy(halves, &off, sizeof off), std::memcpy(whole, &p.x[i], sizeof off);
        for (int h = 0; h < 2; h++) {
            const D e = widen(halves[h]), n = widen(whole[h]);
            sums[h] += e * e, sums[2 + h] += n * n;
        }
    });
    std::memcpy(error, sums, 2 * sizeof(D)), std::memcpy(norm, sums + 2, 2 * sizeof(D));
}

// One lane's scales as the file holds them.
inline void write_scales(uint8_t* to, const GgufKind& kind, const Panel& p, const U& outer, const U& outer_low, int64_t lane) {
    if (kind.exponent) {
        to[0] = uint8_t(p.exponent[lane]);
        return;
    }
    const uint16_t half = uint16_t(outer[lane]), half_low = uint16_t(outer_low[lane]);
    std::memcpy(to + kind.scale, &half, 2);
    if (kind.minimum >= 0) std::memcpy(to + kind.minimum, &half_low, 2);
    uint8_t* s = to + kind.small_at;
    auto small = [&](int64_t g) { return int(p.small[g][lane]); };
    auto least = [&](int64_t g) { return int(p.least[g][lane]); };
    switch (kind.small) {
        case NIBBLES:
            for (int64_t g = 0; g < 16; g++) s[g] = uint8_t(small(g) | least(g) << 4);
            break;
        case BYTES:
            for (int64_t g = 0; g < 16; g++) s[g] = uint8_t(small(g));
            break;
        case SIGNED_SIX:
            std::memset(s, 0, 12);
            for (int64_t g = 0; g < 16; g++) {
                const int lifted = small(g) + 32;
                s[g % 8] |= (lifted & 15) << (g / 8 * 4), s[8 + g % 4] |= lifted >> 4 << (g / 4 * 2);
            }
            break;
        case SIX:
            for (int64_t g = 0; g < 4; g++) {
                const int a = small(g), b = small(g + 4), c = least(g), d = least(g + 4);
                s[g] = uint8_t(a | b >> 4 << 6), s[4 + g] = uint8_t(c | d >> 4 << 6), s[8 + g] = uint8_t((b & 15) | (d & 15) << 4);
            }
    }
}

struct GgufJob {
    const char* weight;
    const float* importance;  // [columns] or null
    int64_t blocks, in_row;
    uint8_t* data;
    double* sums;  // [blocks, 2]
    std::atomic<int64_t> nonfinite{0};
};

// Sixteen floats each of sixteen rows, turned so that each row is a lane.
inline void turn(const float* from, int64_t stride, float* to) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(from + i * stride);
    for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + 2 + j]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0x88);
            b[i + 4 + j] = _mm512_shuffle_f32x4(a[i + j], a[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        _mm512_storeu_ps(to + j * 16, _mm512_shuffle_f32x4(b[j], b[8 + j], 0x88));
        _mm512_storeu_ps(to + (j + 8) * 16, _mm512_shuffle_f32x4(b[j], b[8 + j], 0xdd));
    }
#else
    for (int64_t i = 0; i < STEP; i++)
        for (int64_t lane = 0; lane < LANES; lane++) to[i * LANES + lane] = from[lane * stride + i];
#endif
}

// The other way round, as bytes: sixteen codes of each lane, WIDEST apart.
inline void turn_bytes(const U* codes, uint8_t* to) {
#if defined(__AVX512F__)
    __m128i a[16], b[16];
    for (int i = 0; i < 16; i++) a[i] = cast<__m128i>(narrow(codes[i]));
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]), b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
        std::memcpy(a, b, sizeof a);
    }
    for (int lane = 0; lane < 16; lane++) std::memcpy(to + lane * WIDEST, &a[lane], 16);
#else
    for (int64_t i = 0; i < STEP; i++)
        for (int64_t lane = 0; lane < LANES; lane++) to[lane * WIDEST + i] = uint8_t(codes[i][lane]);
#endif
}

// Blocks `first` and on into the lanes; beyond the last one zeros.
template <int T> void load_panel(Panel& p, const GgufKind& kind, GgufJob& job, int64_t first, int64_t count) {
    float rows[LANES][STEP] = {};
    I bad{};
    for (int64_t i = 0; i < kind.block; i += STEP) {
        for (int64_t lane = 0; lane < count; lane++)
            for (int64_t j = 0; j < STEP; j += LANES) {
                const F f = load<T>(job.weight + ((first + lane) * kind.block + i + j) * width<T>());
                bad -= cast<I>((cast<U>(f) & 0x7fffffffu) >= 0x7f800000u);
                std::memcpy(&rows[lane][j], &f, sizeof f);
            }
        turn(rows[0], STEP, reinterpret_cast<float*>(p.x + i));
    }
    int64_t found = 0;
    for (int64_t j = 0; j < LANES; j++) found += bad[j];
    if (found) job.nonfinite += found;
    if (!job.importance) return;
    std::fill(rows[0], rows[0] + LANES * STEP, 1.0f);
    for (int64_t i = 0; i < kind.block; i += STEP) {
        for (int64_t lane = 0; lane < count; lane++)
            std::memcpy(rows[lane], job.importance + (first + lane) % job.in_row * kind.block + i, sizeof rows[lane]);
        turn(rows[0], STEP, reinterpret_cast<float*>(p.w + i));
    }
}

typedef void (*Load)(Panel&, const GgufKind&, GgufJob&, int64_t, int64_t);

template <class Levels>
void gguf_quantize(Load load, const GgufKind& kind, const GgufTries& tries, bool unbiased, GgufJob& job, int threads) {
    const Levels levels(kind);
    const int64_t panels = (job.blocks + LANES - 1) / LANES, together = std::max<int64_t>(1, (1 << 13) / (LANES * kind.block));
    parallel((panels + together - 1) / together, threads, [&](int64_t task) {
        const auto p = std::make_unique<Panel>();
        std::fill(p->w, p->w + WIDEST, splat(1.0f));
        for (int64_t panel = task * together; panel < std::min(panels, (task + 1) * together); panel++) {
            const int64_t first = panel * LANES, count = std::min(LANES, job.blocks - first);
            load(*p, kind, job, first, count);
            if (kind.exponent) exponents(*p);
            else if (job.importance) find<true>(*p, kind, tries, levels);
            else find<false>(*p, kind, tries, levels);
            double error[LANES], norm[LANES];
            const bool longer = unbiased && tries.form != 2;
            if (!kind.exponent && job.importance) round_codes<true>(*p, kind, levels, longer);
            else if (!kind.exponent) round_codes<false>(*p, kind, levels, longer);
            price(*p, kind, levels, error, norm);
            const U outer = half_bits(p->outer), outer_low = half_bits(p->outer_low);
            uint8_t codes[LANES][WIDEST];
            for (int64_t i = 0; i < kind.block; i += STEP) turn_bytes(p->codes + i, codes[0] + i);
            for (int64_t lane = 0; lane < count; lane++) {
                uint8_t* to = job.data + (first + lane) * kind.nbytes;
                write_scales(to, kind, *p, outer, outer_low, lane);
                write_codes(to, kind, codes[lane]);
                job.sums[2 * (first + lane)] = error[lane], job.sums[2 * (first + lane) + 1] = norm[lane];
            }
        }
    });
}

}  // namespace

// stats: squared error, squared norm, NaN and Inf. importance may be null.
extern "C" void kompressor_gguf_quantize(const char* weight, int dtype, const float* importance, int64_t rows, int64_t columns,
                                         const GgufKind* kind, const GgufTries* tries, int unbiased, int threads, uint8_t* data,
                                         double* stats) {
    const int64_t in_row = columns / kind->block, blocks = rows * in_row;
    std::vector<double> sums(2 * blocks);
    prefer_huge_pages(data, blocks * kind->nbytes);
    GgufJob job{weight, importance, blocks, in_row, data, sums.data()};
    const Load load = dtype == BF16 ? load_panel<BF16> : dtype == FP16 ? load_panel<FP16> : load_panel<FP32>;
    if (kind->even) gguf_quantize<Even>(load, *kind, *tries, unbiased, job, threads);
    else gguf_quantize<Uneven>(load, *kind, *tries, unbiased, job, threads);
    stats[0] = stats[1] = 0;
    for (int64_t b = 0; b < blocks; b++) stats[0] += sums[2 * b], stats[1] += sums[2 * b + 1];
    stats[2] = double(job.nonfinite);
}
