// What rounding to each of several grids costs, tile by tile: the search for the grid that costs least. The specification is
// `clip_search.tile_errors`.

namespace {

struct Grids {
    int64_t count, tiles;
    const float *step, *zero_point;  // [count, rows, tiles]; zero_point may be null
    float bottom, top;
};

// to the nearest integer, ties to even, of |x| < 2^22
inline F nearest(F x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }

// Sum over x[0, steps * STEP) of the squared error, in sixteen sums side by side.
inline float squared_error(const F* x, int64_t steps, float step, float zero_point, const Grids& grids) {
    const F s = splat(step), each = splat(1.0f / step), z = splat(zero_point), low = splat(grids.bottom), high = splat(grids.top);
    F sums[PARTS] = {};
    for (int64_t i = 0; i < steps; i++) {
        for (int64_t part = 0; part < PARTS; part++, x++) {
            F code = *x * each + z;
            code = code < low ? low : code;
            code = code > high ? high : code;
            const F error = (nearest(code) - z) * s - *x;
            sums[part] = sums[part] + error * error;
        }
    }
    float lanes[STEP], sum = 0;
    std::memcpy(lanes, sums, sizeof lanes);
    for (float lane : lanes) sum += lane;
    return sum;
}

template <int T>
void tile_errors(const char* weight, int64_t rows, int64_t columns, const Grids& grids, int threads, float* errors) {
    const int64_t wide = columns / grids.tiles, steps = (wide + STEP - 1) / STEP;
    const int64_t together = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(columns, 1));
    parallel((rows + together - 1) / together, threads, [&](int64_t task) {
        std::vector<F> x(steps * PARTS);
        for (int64_t row = task * together; row < std::min(rows, (task + 1) * together); row++) {
            for (int64_t t = 0; t < grids.tiles; t++) {
                const char* p = weight + (row * columns + t * wide) * width<T>();
                for (int64_t i = 0; i < steps * PARTS; i++) {  // zeros after the tile: no grid has an error there
                    const int64_t n = std::min(LANES, std::max<int64_t>(0, wide - i * LANES));
                    x[i] = n == LANES ? load<T>(p + i * LANES * width<T>()) : load_some<T>(p + i * LANES * width<T>(), n);
                }
                for (int64_t k = 0; k < grids.count; k++) {
                    const int64_t at = (k * rows + row) * grids.tiles + t;
                    errors[at] = squared_error(x.data(), steps, grids.step[at], grids.zero_point ? grids.zero_point[at] : 0.0f, grids);
                }
            }
        }
    });
}

}  // namespace

extern "C" void kompressor_tile_errors(const void* weight, int dtype, int64_t rows, int64_t columns, int64_t count, int64_t tiles,
                                       const float* step, const float* zero_point, int bottom, int top, int threads, float* errors) {
    const Grids grids{count, tiles, step, zero_point, float(bottom), float(top)};
    const char* w = static_cast<const char*>(weight);
    if (dtype == BF16) tile_errors<BF16>(w, rows, columns, grids, threads, errors);
    if (dtype == FP16) tile_errors<FP16>(w, rows, columns, grids, threads, errors);
    if (dtype == FP32) tile_errors<FP32>(w, rows, columns, grids, threads, errors);
}
