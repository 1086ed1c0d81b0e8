// SparseGPT's part of a block of columns, with the panels and products of GPTQ's loop; the specification is `pruning.py`.
// A weight that goes costs itself over the factor's diagonal, one that stays costs nothing.

namespace {

struct Pruning {
    const float *weight, *factor;  // [rows, width], [width, width]
    int64_t rows, width;
    const uint8_t* mask;  // [rows, width], 1: goes; null with a pattern
    int64_t keep, of;     // of every `of` neighbours `keep` stay; 0 with a mask
    float *kept, *errors;  // [rows, width]
};

// Of the `of` columns at w those go whose w / u is smallest, of equals the first: 1 at `mask`, 0 where they stay.
void choose(const Pruning& job, const float* w, const float* const* u, uint8_t* mask) {
    for (int64_t half = 0; half < PANEL; half += LANES) {
        F score[32];
        for (int64_t j = 0; j < job.of; j++) {
            const F x = fetch(w + j * PANEL + half) / splat(*u[j]);
            score[j] = x * x;
        }
        for (int64_t j = 0; j < job.of; j++) {
            I smaller{};  // minus how many of the others go before it
            for (int64_t k = 0; k < job.of; k++)
                if (k != j) smaller += k < j ? cast<I>(score[k] <= score[j]) : cast<I>(score[k] < score[j]);
            const U goes = cast<U>(-smaller < I{} + int32_t(job.of - job.keep)) & 1u;
            const B bytes = narrow(goes);
            std::memcpy(mask + j * PANEL + half, &bytes, sizeof bytes);
        }
    }
}

// One panel: weights [width][PANEL], which errors take the place of; what stays, and the mask, as they are there.
void prune_panel(const Pruning& job, const float* packed, float* leaf, float* kept, uint8_t* mask) {
    const auto factor = [&](int64_t j, int64_t k) { return packed + (k - k % TILE) * job.width + j * TILE + k % TILE; };
    const int64_t step = job.of ? job.of : TILE;
    for (int64_t left = 0; left < job.width; left += step) {
        const int64_t right = std::min(left + step, job.width);
        if (job.of) {
            const float* diagonal[32];
            for (int64_t j = left; j < right; j++) diagonal[j - left] = factor(j, j);
            choose(job, leaf + left * PANEL, diagonal, mask + left * PANEL);
        }
        for (int64_t j = left; j < right; j++)
            for (int64_t half = 0; half < PANEL; half += LANES) {
                float* const at = leaf + j * PANEL + half;
                B bytes;
                std::memcpy(&bytes, mask + j * PANEL + half, sizeof bytes);
                const auto goes = widen(bytes) != 0u;
                const F w = fetch(at), error = goes ? w / splat(*factor(j, j)) : F{};
                put(kept + j * PANEL + half, goes ? F{} : w), put(at, error);
                for (int64_t k = j + 1; k < right; k++) {
                    float* const next = leaf + k * PANEL + half;
                    put(next, minus_product(error, splat(*factor(j, k)), fetch(next)));
                }
            }
        for (int64_t k = right; k < job.width;) {
            const int64_t stop = std::min(k - k % TILE + TILE, job.width);
            take_some(stop - k, leaf + left * PANEL, factor(left, k), right - left, leaf + k * PANEL);
            k = stop;
        }
    }
}

}  // namespace

// With a `mask`, or with keep and of. threads: rows never meet.
extern "C" void kompressor_prune(const float* weight, const float* factor, int64_t rows, int64_t width, const uint8_t* mask, int64_t keep,
                                 int64_t of, int threads, float* kept, float* errors) {
    const Pruning job{weight, factor, rows, width, mask, keep, of, kept, errors};
    Columns square{};
    square.factor = factor, square.columns = width;
    std::vector<float> packed((width + TILE) * width);
    pack(square, 0, width, width, 0, width, packed.data());
    parallel((rows + PANEL - 1) / PANEL, threads, [&](int64_t panel) {
        const int64_t first = panel * PANEL, count = std::min(PANEL, rows - first);
        std::vector<F> aligned(2 * width * PANEL / LANES);  // zeros, which is what rows beyond the last one hold
        float *const leaf = reinterpret_cast<float*>(aligned.data()), *const stay = leaf + width * PANEL;
        std::vector<uint8_t> chosen(width * PANEL);
        for (int64_t r = 0; r < count; r++)
            for (int64_t k = 0; k < width; k++) {
                leaf[k * PANEL + r] = job.weight[(first + r) * width + k];
                if (mask) chosen[k * PANEL + r] = mask[(first + r) * width + k];
            }
        prune_panel(job, packed.data(), leaf, stay, chosen.data());
        for (int64_t r = 0; r < count; r++)
            for (int64_t k = 0; k < width; k++) {
                job.kept[(first + r) * width + k] = stay[k * PANEL + r];
                job.errors[(first + r) * width + k] = leaf[k * PANEL + r];
            }
    });
}
