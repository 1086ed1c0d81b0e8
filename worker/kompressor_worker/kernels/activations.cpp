// Activations rounded as a runtime rounds them, and back: what evaluation sees. The specification is `activations.py`.
// A row is read twice, the second time from the cache, and written once.

namespace {

struct Inputs {
    const char* x;
    char* made;
    int64_t rows, columns, tile;  // tile: columns that share a scale
    const float* scale;           // [scales], row r has scale[r % scales]; null: of each tile's own range
    int64_t scales;
    float zero_point, global_scale;
};

// Sixteen or fewer tiles' magnitudes to the width of one code.
template <class Codec> inline F step_of(Codec codec, F amax, float global_scale) {
    if constexpr (std::is_same_v<Codec, Nvfp4>) return nvfp4_scale(amax, global_scale).value / global_scale;
    else return stored<FP32>(codec.scale(amax));
}

template <int T, class Codec> inline void round_some(Codec codec, const char* p, char* to, int64_t count, F step, float zero_point) {
    const F x = count >= LANES ? load<T>(p) : load_some<T>(p, count);
    F y = x / step;
    if constexpr (Codec::asymmetric) y = y + zero_point;
    F value = codec.round(y).value;
    if constexpr (Codec::asymmetric) value = value - zero_point;
    const F made = value * step;
    store<T>(to, x == x ? made : x, std::min(count, LANES));
}

template <int T, class Codec> void fake_quantize(Codec codec, const Inputs& job, int threads) {
    const int64_t together = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(job.columns, 1));
    const int64_t tiles_of_row = (job.columns + job.tile - 1) / job.tile;
    parallel((job.rows + together - 1) / together, threads, [&](int64_t task) {
        Tiles tiles(tiles_of_row);
        Job scanned{};
        for (int64_t row = task * together; row < std::min(job.rows, (task + 1) * together); row++) {
            const char* p = job.x + row * job.columns * width<T>();
            char* to = job.made + row * job.columns * width<T>();
            if (!job.scale) {
                tiles.clear();
                scan<T, false>(p, job.columns, job.tile, tiles, scanned);
                if constexpr (!Codec::asymmetric)
                    for (int64_t t = 0; t < tiles_of_row; t += LANES) {
                        U bits{};
                        std::memcpy(&bits, &tiles.amax[t], std::min(LANES, tiles_of_row - t) * 4);
                        put(&tiles.step[t], step_of(codec, Bits<T>::value(bits), job.global_scale));
                    }
            }
            for (int64_t t = 0, start = 0; start < job.columns; t++, start += job.tile) {
                const int64_t stop = std::min(start + job.tile, job.columns);
                const F step = splat(job.scale ? job.scale[row % job.scales] : tiles.step[t]);
                for (int64_t i = start; i < stop; i += LANES)
                    round_some<T>(codec, p + i * width<T>(), to + i * width<T>(), stop - i, step, job.zero_point);
            }
        }
    });
}

template <int T> void fake_quantize_as(int codec, const Inputs& job, int threads) {
    Job format{};
    format.bits = 8, format.bias = 0;
    switch (codec) {
        case 0: return fake_quantize<T>(Symmetric(format), job, threads);
        case 1: return fake_quantize<T>(Asymmetric(format), job, threads);
        case 2: return fake_quantize<T>(Fp8(format), job, threads);
        case 4: return fake_quantize<T>(Nvfp4(format), job, threads);
    }
}

}  // namespace

// codec: as in `kompressor_quantize`; 1 needs a scale.
extern "C" void kompressor_fake_quantize(const void* x, int dtype, int64_t rows, int64_t columns, int64_t tile, int codec,
                                         const float* scale, int64_t scales, float zero_point, float global_scale, int threads,
                                         void* made) {
    prefer_huge_pages(made, rows * columns * (dtype == FP32 ? 4 : 2));
    const Inputs job{static_cast<const char*>(x), static_cast<char*>(made), rows, columns, tile, scale, scales, zero_point, global_scale};
    if (dtype == BF16) fake_quantize_as<BF16>(codec, job, threads);
    if (dtype == FP16) fake_quantize_as<FP16>(codec, job, threads);
    if (dtype == FP32) fake_quantize_as<FP32>(codec, job, threads);
}
