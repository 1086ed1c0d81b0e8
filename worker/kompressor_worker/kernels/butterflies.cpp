// The Walsh-Hadamard transform of rows, by butterflies; the specification is `butterflies.py`, which it equals bit for bit.

namespace {

template <class V> struct Lanes {
    typedef std::remove_reference_t<decltype(V{}[0])> T;
    static constexpr int64_t count = sizeof(V) / sizeof(T);
};

// Lane i of the result is x[i] + x[i ^ h] where bit h of i is 0, else x[i ^ h] - x[i].
template <int64_t h, class V> inline V butterfly_within(V x) {
    V other, sign;
#pragma GCC unroll 16
    for (int64_t i = 0; i < Lanes<V>::count; i++) other[i] = x[i ^ h], sign[i] = i & h ? -1 : 1;
    return other + sign * x;
}

template <class V> inline V fetch_as(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// In place, of `size` numbers, a power of two: x H without the factor.
template <class V> void transform(typename Lanes<V>::T* x, int64_t size) {
    constexpr int64_t lanes = Lanes<V>::count;
    if (size < lanes) {
        for (int64_t h = 1; h < size; h *= 2)
            for (int64_t i = 0; i < size; i++)
                if (!(i & h)) {
                    const auto a = x[i], b = x[i + h];
                    x[i] = a + b, x[i + h] = a - b;
                }
        return;
    }
    for (int64_t i = 0; i < size; i += lanes) {
        V v = butterfly_within<1>(fetch_as<V>(x + i));
        if constexpr (lanes > 2) v = butterfly_within<2>(v);
        if constexpr (lanes > 4) v = butterfly_within<4>(v);
        if constexpr (lanes > 8) v = butterfly_within<8>(v);
        std::memcpy(x + i, &v, sizeof v);
    }
    for (int64_t h = lanes; h < size; h *= 2)
        for (int64_t start = 0; start < size; start += 2 * h)
            for (int64_t i = start; i < start + h; i += lanes) {
                const V a = fetch_as<V>(x + i), b = fetch_as<V>(x + i + h), sum = a + b, difference = a - b;
                std::memcpy(x + i, &sum, sizeof sum), std::memcpy(x + i + h, &difference, sizeof difference);
            }
}

template <class V>
void hadamard(const void* source, int64_t rows, int64_t order, int64_t power, const double* base, int threads, void* made) {
    typedef typename Lanes<V>::T T;
    const int64_t size = order * power, together = std::max<int64_t>(1, (1 << 16) / size);
    const T root = T(std::sqrt(double(power)));
    parallel((rows + together - 1) / together, threads, [&](int64_t task) {
        std::vector<T> row(size);
        for (int64_t r = task * together; r < std::min(rows, (task + 1) * together); r++) {
            T* out = static_cast<T*>(made) + r * size;
            std::memcpy(row.data(), static_cast<const T*>(source) + r * size, size * sizeof(T));
            for (int64_t block = 0; block < order; block++) transform<V>(row.data() + block * power, power);
            for (int64_t j = 0; j < order; j++, out += power) {
                if (order == 1) {
                    for (int64_t k = 0; k < power; k++) out[k] = row[k] / root;
                    continue;
                }
                for (int64_t i = 0; i < order; i++) {
                    const T b = T(base[i * order + j]);
                    const T* x = row.data() + i * power;
                    for (int64_t k = 0; k < power; k++) out[k] = (i ? out[k] : 0) + b * x[k];
                }
                for (int64_t k = 0; k < power; k++) out[k] /= root;
            }
        }
    });
}

}  // namespace

// Rows of order * power numbers, fp64 or else fp32; base fp64 [order, order], null for an order of 1.
extern "C" void kompressor_hadamard(const void* x, int wide, int64_t rows, int64_t order, int64_t power, const double* base, int threads,
                                    void* made) {
    if (wide) hadamard<D>(x, rows, order, power, base, threads, made);
    else hadamard<F>(x, rows, order, power, base, threads, made);
}
