// Codes moved by a level so that outputs are right on average: rows into lanes, columns one after the other. The specification is
// `gguf_mean`.

namespace {

constexpr int MEAN_ROUNDS = 2;

// What is known of as many rows as there are lanes.
struct MeanPanel {
    std::vector<F> source, error, place, step;  // [columns], [columns], [columns], [groups]
    F total{};
};

template <int T>
void load_rows(MeanPanel& p, const char* weight, const uint8_t* data, const GgufKind& kind, int64_t blocks, int64_t first, int64_t count) {
    const int64_t groups = kind.block / kind.group;
    float values[WIDEST];
    uint8_t codes[WIDEST];
    GroupScales scales;
    for (int64_t lane = 0; lane < count; lane++)
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t* from = data + ((first + lane) * blocks + b) * kind.nbytes;
            const char* x = weight + ((first + lane) * blocks + b) * kind.block * width<T>();
            decode_block(from, kind, values), read_codes(from, kind, codes), group_scales(from, kind, scales);
            for (int64_t g = 0; g < groups; g++) p.step[b * groups + g][lane] = scales.step[g];
            for (int64_t i = 0; i < kind.block; i += LANES) {
                const F f = load<T>(x + i * width<T>());
                for (int64_t j = 0; j < LANES; j++) {
                    const int64_t at = b * kind.block + i + j;
                    p.source[at][lane] = f[j], p.error[at][lane] = values[i + j] - f[j], p.place[at][lane] = float(codes[i + j]);
                }
            }
        }
}

void move_codes(MeanPanel& p, const GgufKind& kind, const float* variance, const float* mean, int64_t columns) {
    const F top = splat(kind.levels[1] - kind.levels[0]), zero{}, up = splat(1.0f);
    p.total = zero;
    for (int64_t i = 0; i < columns; i++) p.total += mean[i] * p.error[i];
    for (int round = 0; round < MEAN_ROUNDS; round++)
        for (int64_t i = 0; i < columns; i++) {
            const F e = p.error[i], s = p.step[i / kind.group], way = e * s > zero ? -up : up, move = way * s, to = p.place[i] + way;
            const F sway = mean[i] * move, change = variance[i] * (move * (e + e + move)) + sway * (p.total + p.total + sway);
            const I better = (change < zero) & (to >= zero) & (to <= top) & (p.source[i] != zero);
            p.error[i] = better ? e + move : e;
            p.place[i] = better ? to : p.place[i];
            p.total = better ? p.total + sway : p.total;
        }
}

void store_rows(const MeanPanel& p, const GgufKind& kind, int64_t blocks, int64_t first, int64_t count, uint8_t* data) {
    uint8_t codes[WIDEST];
    for (int64_t lane = 0; lane < count; lane++)
        for (int64_t b = 0; b < blocks; b++) {
            for (int64_t i = 0; i < kind.block; i++) codes[i] = uint8_t(p.place[b * kind.block + i][lane]);
            write_codes(data + ((first + lane) * blocks + b) * kind.nbytes, kind, codes);
        }
}

typedef void (*LoadRows)(MeanPanel&, const char*, const uint8_t*, const GgufKind&, int64_t, int64_t, int64_t);

}  // namespace

// Changes the codes in `data`; variance and mean [columns]. For types whose levels are even.
extern "C" void kompressor_gguf_keep_mean(const char* weight, int dtype, const float* variance, const float* mean, const GgufKind* kind,
                                          int64_t rows, int64_t columns, int threads, uint8_t* data) {
    const LoadRows load = dtype == BF16 ? load_rows<BF16> : dtype == FP16 ? load_rows<FP16> : load_rows<FP32>;
    const int64_t blocks = columns / kind->block;
    parallel((rows + LANES - 1) / LANES, threads, [&](int64_t task) {
        MeanPanel p;
        const std::vector<F> none(columns);
        p.source = p.error = p.place = none, p.step.resize(columns / kind->group);
        const int64_t first = task * LANES, count = std::min(LANES, rows - first);
        load(p, weight, data, *kind, blocks, first, count);
        move_codes(p, *kind, variance, mean, columns);
        store_rows(p, *kind, blocks, first, count, data);
    });
}
