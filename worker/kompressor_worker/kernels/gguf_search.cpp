// The search for scales, minima and codes of GGUF's blocks. The specification is `gguf_search.py`, which is followed operation by operation.
// A lane of a vector is a block: all that is summed up goes by column, and no bit depends on how many lanes there are.

namespace {

constexpr int ABREAST = 4;  // steps that are tried side by side

// What `gguf_search.py` tries.
struct GgufTries {
    int32_t form, widths, outers, cuts;  // form: 0 symmetric, 1 with minima, 2 by the largest magnitude, 3 by exponent
    float width[16], outer[8];     // outer: the smallest integer times its share
    double cut[6];
};

// So many blocks as there are lanes.
struct Panel {
    F x[WIDEST], w[WIDEST], small[MOST_GROUPS], least[MOST_GROUPS], outer, outer_low;
    U codes[WIDEST], exponent;
};

#if defined(__AVX512F__)
inline F at_least(F x, F low) { return cast<F>(_mm512_max_ps(cast<__m512>(low), cast<__m512>(x))); }  // NaN stays NaN
inline F at_most(F x, F high) { return cast<F>(_mm512_min_ps(cast<__m512>(high), cast<__m512>(x))); }
#else
inline F at_least(F x, F low) { return low > x ? low : x; }
inline F at_most(F x, F high) { return high < x ? high : x; }
#endif
inline F within(F x, F low, F high) { return at_most(at_least(x, low), high); }
inline F inverse(F step) { return step == F{} ? F{} : 1.0f / step; }
inline U half_bits(F x) {
    const U bits = float_to_half(within(x, splat(-65504.0f), splat(65504.0f)));
    return (bits & 0x7fffu) == 0u ? U{} : bits;  // no zero below zero
}
inline F as_half(F x) { return half_to_float(half_bits(x)); }

struct Even {
    F first, last;
    explicit Even(const GgufKind& kind) : first(splat(kind.levels[0])), last(splat(kind.levels[1])) {}
    F round(F y) const { return nearest(within(y, first, last)); }
    U place(F level) const { return cast<U>(__builtin_convertvector(level - first, I)); }
    F level_at(U place) const { return first + __builtin_convertvector(cast<I>(place), F); }
};

struct Uneven {  // sixteen, rising (but for MXFP4's, to whose nearest nothing is rounded here)
    float level[16], bound[15];
    explicit Uneven(const GgufKind& kind) {
        std::memcpy(level, kind.levels, sizeof level);
        for (int k = 0; k < 15; k++) bound[k] = (level[k] + level[k + 1]) / 2.0f;
    }
    F round(F y) const {
        F made = splat(level[0]);
        for (int k = 0; k < 15; k++) made = y > bound[k] ? splat(level[k + 1]) : made;
        return made;
    }
    U place(F value) const {
        U made{};
        for (int k = 1; k < 16; k++) made = cast<U>(value) == cast<U>(splat(level[k])) ? usplat(k) : made;
        return made;
    }
    F level_at(U place) const {
        F made;
        for (int64_t i = 0; i < LANES; i++) made[i] = level[place[i]];
        return made;
    }
};

// 2^(exponent - 128): MXFP4's levels are doubled
inline F half_exponents(U e) { return cast<F>(e < 2u ? usplat(0x00200000u) << e : (e - 1u) << 23); }

inline F largest(const F* x, int64_t count) {
    F high = x[0], low = x[0];
    for (int64_t i = 1; i < count; i++) high = at_least(x[i], high), low = at_most(x[i], low);
    return high >= -low ? high : low;
}

// The sums over one group for steps tried side by side: of w q x, w q q, and where there are minima of w q.
template <int tried, bool minima, bool weighted, class Levels>
inline void sums(const F* x, const F* w, int64_t count, F start, const F* inverses, const Levels& levels, F* qx, F* qq, F* q = nullptr) {
    F a[tried] = {}, b[tried] = {}, c[tried] = {};
    for (int64_t i = 0; i < count; i++) {
        const F from = minima ? x[i] - start : x[i];
        for (int k = 0; k < tried; k++) {
            const F level = levels.round(from * inverses[k]), wq = weighted ? w[i] * level : level;
            a[k] += wq * x[i], b[k] += wq * level;
            if constexpr (minima) c[k] += wq;
        }
    }
    for (int k = 0; k < tried; k++) {
        qx[k] = a[k], qq[k] = b[k];
        if constexpr (minima) q[k] = c[k];
    }
}

template <bool weighted, class Levels> struct OneScale {
    const GgufKind& kind;
    const GgufTries& tries;
    const Levels& levels;
    Panel& p;

    F group_scale(const F* x, const F* w) const {
        F best{}, scale{};
        const F most = largest(x, kind.group), each = 1.0f / most;
        const auto live = (most < F{} ? -most : most) > 1e-15f;
        for (int first = 0; first < tries.widths; first += ABREAST) {
            F inverses[ABREAST], qx[ABREAST], qq[ABREAST];
            for (int k = 0; k < ABREAST; k++) inverses[k] = live ? each * tries.width[first + k] : F{};
            sums<ABREAST, false, weighted>(x, w, kind.group, F{}, inverses, levels, qx, qq);
            for (int k = 0; k < ABREAST; k++) {
                const F fitted = qx[k] / qq[k], gain = fitted * qx[k];
                const auto better = (gain > best) & (gain < splat(INFINITY));
                best = better ? gain : best, scale = better ? fitted : scale;
            }
        }
        return scale;
    }

    void sums_at(int64_t g, F step, F* qx, F* qq) const {
        const F each = inverse(step);
        sums<1, false, weighted>(p.x + g * kind.group, p.w + g * kind.group, kind.group, F{}, &each, levels, qx, qq);
    }

    void run() const {
        const int64_t groups = kind.block / kind.group;
        F scale[MOST_GROUPS], weight[MOST_GROUPS], qx, qq;
        for (int64_t g = 0; g < groups; g++) scale[g] = group_scale(p.x + g * kind.group, p.w + g * kind.group);
        if (kind.small == NONE) {
            const F outer = as_half(scale[0]);
            sums_at(0, outer, &qx, &qq);
            p.outer = as_half(qq > F{} ? qx / qq : outer);
            return;
        }
        for (int64_t g = 0; g < groups; g++) sums_at(g, scale[g], &qx, &weight[g]);
        const F outer = outer_scale(scale, weight, groups), each = inverse(outer);
        F above{}, below{};
        for (int64_t g = 0; g < groups; g++) {
            const F small = nearest(within(scale[g] * each, splat(kind.small_bottom), splat(kind.small_top)));
            sums_at(g, outer * small, &qx, &qq);
            above += small * qx, below += small * small * qq;
            p.small[g] = small;
        }
        p.outer = as_half(below > F{} ? above / below : outer);
    }

    F outer_scale(const F* scale, const F* weight, int64_t groups) const {
        const F most = largest(scale, groups), bottom = splat(kind.small_bottom), top = splat(kind.small_top);
        F best = splat(INFINITY), chosen{};
        for (int k = 0; k < tries.outers; k++) {
            const F outer = as_half(most / tries.outer[k]), each = inverse(outer);
            F cost{};
            for (int64_t g = 0; g < groups; g++) {
                const F off = scale[g] - outer * nearest(within(scale[g] * each, bottom, top));
                cost += weight[g] * off * off;
            }
            const auto better = cost < best;
            best = better ? cost : best, chosen = better ? outer : chosen;
        }
        return chosen;
    }
};

template <bool weighted> struct WithMinima {
    const GgufKind& kind;
    const GgufTries& tries;
    const Even& levels;
    Panel& p;

    struct Line {
        F w, wx;
        F slope, offset, cost;
        void fit(F q, F qq, F qx, bool below_zero) {
            const F det = w * qq - q * q;
            slope = (w * qx - q * wx) / det, offset = (qq * wx - q * qx) / det;
            auto usable = det > F{};
            if (below_zero) {
                const auto none = (offset > F{}) | ~usable;
                slope = none ? qx / qq : slope, offset = none ? F{} : offset, usable = qq > F{};
            }
            cost = usable & (slope > F{}) ? -(slope * qx + offset * wx) : splat(INFINITY);
        }
    };

    Line line(const F* x, const F* w) const {
        Line made{};
        for (int64_t i = 0; i < kind.group; i++) made.w += w[i], made.wx += w[i] * x[i];
        return made;
    }

    void group_line(const F* x, const F* w, Line& found, F& scale, F& offset) const {
        const bool below_zero = kind.small != NONE;
        F low = x[0], high = x[0];
        for (int64_t i = 1; i < kind.group; i++) high = at_least(x[i], high), low = at_most(x[i], low);
        offset = found.wx / found.w, scale = F{};
        if (below_zero) low = at_most(low, F{}), offset = at_most(offset, F{});
        const F span = high - low, step = span / kind.levels[1];
        const auto live = span > 1e-15f;
        F best = -(offset * found.wx);
        constexpr int abreast = weighted ? 3 : 4;
        for (int k = 0; k < tries.cuts * tries.cuts; k += abreast) {
            const double at_low = tries.cut[k / tries.cuts];
            const F start = low + float(at_low) * step;
            F inverses[abreast], q[abreast], qq[abreast], qx[abreast];
            for (int j = 0; j < abreast; j++) {
                const float both = float(at_low + tries.cut[(k + j) % tries.cuts]);
                inverses[j] = live ? 1.0f / (span - both * step) * kind.levels[1] : F{};
            }
            sums<abreast, true, weighted>(x, w, kind.group, start, inverses, levels, qx, qq, q);
            for (int j = 0; j < abreast; j++) {
                found.fit(q[j], qq[j], qx[j], below_zero);
                const auto better = found.cost < best;
                best = better ? found.cost : best, scale = better ? found.slope : scale, offset = better ? found.offset : offset;
            }
        }
    }

    void run() const {
        const int64_t groups = kind.block / kind.group;
        Line lines[MOST_GROUPS];
        F scale[MOST_GROUPS], minimum[MOST_GROUPS], most{}, most_low{};
        for (int64_t g = 0; g < groups; g++) {
            const F *x = p.x + g * kind.group, *w = p.w + g * kind.group;
            lines[g] = line(x, w);
            group_line(x, w, lines[g], scale[g], minimum[g]);
            if (kind.small == NONE) return halves(x, w, lines[g], scale[g], minimum[g]);
            minimum[g] = 0.0f - minimum[g];
            most = g ? at_least(scale[g], most) : scale[g], most_low = g ? at_least(minimum[g], most_low) : minimum[g];
        }
        const F outer = as_half(most / kind.small_top), outer_low = as_half(most_low / kind.small_top);
        F aa{}, ab{}, bb{}, ax{}, bx{};
        for (int64_t g = 0; g < groups; g++) {
            F q, qq, qx;
            integers(g, lines[g], scale[g], minimum[g], outer, outer_low, q, qq, qx);
            const F small = p.small[g], least = p.least[g];
            aa += small * small * qq, ab += small * least * q, bb += least * least * lines[g].w;
            ax += small * qx, bx += least * lines[g].wx;
        }
        const F det = aa * bb - ab * ab, fitted = (ax * bb - bx * ab) / det, fitted_low = (ax * ab - bx * aa) / det;
        const auto usable = (det > 1e-6f * (aa * bb)) & (fitted > F{}) & (fitted_low > F{}), alone = (bb == F{}) & (ax > F{});
        p.outer = as_half(usable ? fitted : alone ? ax / aa : outer);
        p.outer_low = as_half(usable ? fitted_low : outer_low);
    }

    // Q5_1: scale and minimum are the block's own.
    void halves(const F* x, const F* w, Line line, F scale, F offset) const {
        const F step = as_half(scale), start = as_half(offset), each = inverse(step);
        F q, qq, qx;
        sums<1, true, weighted>(x, w, kind.group, start, &each, levels, &qx, &qq, &q);
        line.fit(q, qq, qx, false);
        const auto better = line.cost < splat(INFINITY);
        p.outer = as_half(better ? line.slope : step), p.outer_low = as_half(better ? line.offset : start);
    }

    // The integers of one group; the sums of the best.
    void integers(int64_t g, const Line& line, F scale, F minimum, F outer, F outer_low, F& q, F& qq, F& qx) const {
        const F *x = p.x + g * kind.group, *w = p.w + g * kind.group, top = splat(kind.small_top);
        const F near = nearest(within(scale * inverse(outer), F{}, top)), each_low = inverse(outer_low);
        F best = splat(INFINITY), at_q{}, at_qq{}, at_qx{};
        q = qq = qx = p.small[g] = p.least[g] = F{};
        for (const float beside : {-1.0f, 0.0f, 1.0f}) {
            const F small = within(near + beside, F{}, top), step = outer * small, each = inverse(step);
            F sum{};
            for (int64_t i = 0; i < kind.group; i++) {
                const F level = levels.round((x[i] + minimum) * each);
                sum += weighted ? w[i] * level : level;
            }
            const F least = nearest(within((step * sum - line.wx) / line.w * each_low, F{}, top)), low = outer_low * least;
            sums<1, true, weighted>(x, w, kind.group, -low, &each, levels, &at_qx, &at_qq, &at_q);
            const F cost = step * (step * at_qq - 2.0f * at_qx - 2.0f * low * at_q) + low * (2.0f * line.wx + low * line.w);
            const auto better = cost < best;
            best = better ? cost : best, p.small[g] = better ? small : p.small[g], p.least[g] = better ? least : p.least[g];
            q = better ? at_q : q, qq = better ? at_qq : qq, qx = better ? at_qx : qx;
        }
    }
};

// MXFP4: the power of two that costs least of three.
inline void exponents(Panel& p) {
    const F most = largest(p.x, 32);
    const U magnitude = cast<U>(most) & 0x7fffffffu, carried = (magnitude + (1u << 21)) >> 23;
    const I usual = cast<I>(carried == 255u ? usplat(255) : (carried < 2u ? U{} : carried - 2u));
    F best{};
    U codes[32];
    for (const int beside : {0, -1, 1}) {
        I tried = usual + beside;
        tried = tried < 0 ? I{} : tried, tried = tried > 254 ? I{} + 254 : tried;
        const F scale = cast<F>(tried == 0 ? usplat(1u << 22) : cast<U>(tried) << 23);
        F cost{};
        for (int64_t i = 0; i < 32; i++) {
            const F y = p.x[i] / scale;
            const Rounded r = round_to_float<1, 0>(clamp(y, -6, 6));
            const F off = r.value * scale - p.x[i];
            cost += p.w[i] * off * off;
            codes[i] = r.code | (p.x[i] < F{} ? usplat(8) : U{});
        }
        const I better = beside == 0 ? cast<I>(usplat(~0u)) : cost < best;
        best = better ? cost : best, p.exponent = better ? cast<U>(tried) : p.exponent;
        for (int64_t i = 0; i < 32; i++) p.codes[i] = better ? codes[i] : p.codes[i];
    }
}

template <bool weighted, class Levels> inline void find(Panel& p, const GgufKind& kind, const GgufTries& tries, const Levels& levels) {
    if (tries.form == 0) return OneScale<weighted, Levels>{kind, tries, levels, p}.run();
    if constexpr (std::is_same_v<Levels, Even>) {
        if (tries.form == 1) return WithMinima<weighted>{kind, tries, levels, p}.run();
        const F most = largest(p.x, kind.group);
        p.outer = as_half((most < F{} ? -most : most) / 127.0f);
    }
}

}  // namespace
