// What a student's prediction of each token is worth beside its teacher's; the specification is `token_divergence.py`.
// A row of logits is read once, worked on in fp32 in the cache, and replaced by its gradient. Sums are fp32 within a PIECE of a row and fp64
// over pieces, so they do not depend on threads. Exponentials and logarithms are Taylor's series, right to a few units of fp32's last place:
// results agree with torch's to rounding.

namespace {

constexpr int64_t PIECE = 1024;
constexpr float NOWHERE = -1e30f;  // a logit without probability; finite, so that the difference of two of them is 0

// e^x for x <= 88; 0 below the normal numbers, NaN stays NaN.
inline F exponential(F x) {
    const F lowest = splat(-87.0f), clamped = x < lowest ? lowest : x;
    const F whole = (clamped * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;                  // to the nearest power of two
    const F r = (clamped - whole * 0.693359375f) - whole * -2.12194440e-4f;  // log 2 in two parts, the first of few bits
    F sum = splat(1.0f / 5040);
    sum = sum * r + 1.0f / 720, sum = sum * r + 1.0f / 120, sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6, sum = sum * r + 0.5f, sum = sum * r + 1.0f, sum = sum * r + 1.0f;
    const I power = __builtin_convertvector(x == x ? whole : F{}, I) << 23;
    return x < lowest ? F{} : cast<F>(cast<I>(sum) + power);
}

// log x of a normal positive number: x = m 2^e with m around 1, log m = 2 artanh((m - 1) / (m + 1)).
inline F logarithm(F x) {
    const I e = (cast<I>(x) - 0x3f3504f3) >> 23;
    const F m = cast<F>(cast<I>(x) - (e << 23)), s = (m - 1.0f) / (m + 1.0f), square = s * s, power = __builtin_convertvector(e, F);
    F sum = splat(2.0f / 9);
    sum = sum * square + 2.0f / 7, sum = sum * square + 2.0f / 5, sum = sum * square + 2.0f / 3, sum = sum * square + 2.0f;
    return (power * -2.12194440e-4f + s * sum) + power * 0.693359375f;
}

inline F hyperbolic_tangent(F x) {
    const F t = exponential(cast<F>(cast<U>(x) & 0x7fffffffu) * -2.0f), made = (1.0f - t) / (1.0f + t);
    return cast<F>(cast<U>(made) | (cast<U>(x) & 0x80000000u));
}

enum Between { FORWARD = 0, REVERSE = 1, JENSEN_SHANNON = 2 };

struct Judged {
    char* student;            // [n, vocabulary], becomes the gradient
    const char* teacher;      // [n, vocabulary]; null: none
    const int32_t* indices;   // or of the teacher its most likely tokens [n, k],
    const float *known, *rest;  // logs of their probabilities, and of that of all others [n]
    const int64_t* targets;
    int64_t n, vocabulary, k;
    int kind;
    float temperature, labels, cap, teacher_cap;  // a cap of 0: none
    bool gradient;
    double* made;  // [n, 3]
};

// A row in fp32, filled up to whole STEPs.
struct Row {
    std::vector<F> memory;
    float* at;
    int64_t padded;
    explicit Row(int64_t count)
        : memory((count + STEP - 1) / STEP * PARTS), at(reinterpret_cast<float*>(memory.data())), padded(memory.size() * LANES) {}
    inline F get(int64_t i) const { return memory[i / LANES]; }
    inline void put(int64_t i, F f) { memory[i / LANES] = f; }
};

// fp32 within a piece, fp64 over pieces.
struct Sum {
    F lanes[PARTS] = {};
    double value = 0;
    inline void add(int64_t i, F f) { lanes[i / LANES % PARTS] += f; }
    inline void carry() {
        float flat[STEP];
        std::memcpy(flat, lanes, sizeof flat);
        for (float lane : flat) value += lane;
        for (F& lane : lanes) lane = F{};
    }
};

template <class Work> inline void each(const Row& row, std::initializer_list<Sum*> sums, Work work) {
    for (int64_t start = 0; start < row.padded; start += PIECE) {
        for (int64_t i = start; i < std::min(start + PIECE, row.padded); i += LANES) work(i);
        for (Sum* sum : sums) sum->carry();
    }
}

float most_of(const Row& row) {
    F most = splat(NOWHERE);
    for (int64_t i = 0; i < row.padded; i += LANES) most = row.get(i) > most ? row.get(i) : most;
    float largest = NOWHERE;
    for (int64_t lane = 0; lane < LANES; lane++) largest = std::max<float>(largest, most[lane]);
    return largest;
}

int64_t first_of(const Row& row, float value) {
    return std::find(row.at, row.at + row.padded, value) - row.at;
}

template <int T> inline F load_at(const char* p, int64_t i, int64_t count) {
    return count - i >= LANES ? load<T>(p + i * width<T>()) : load_some<T>(p + i * width<T>(), count - i);
}

template <int T> void read_row(const char* p, int64_t count, float cap, Row& row) {
    for (int64_t i = 0; i < count; i += LANES) {
        const F x = load_at<T>(p, i, count);
        row.put(i, cap == 0 ? x : hyperbolic_tangent(x / cap) * cap);
    }
    std::fill(row.at + count, row.at + row.padded, NOWHERE);
}

// In place of the logits slope(i), less `labels` at the target, times the slope of the cap.
template <int T, class Slope> void write_row(char* p, int64_t count, float cap, int64_t target, float labels, Slope slope) {
    for (int64_t i = 0; i < count; i += LANES) {
        F made = slope(i);
        if (target >= i && target < i + LANES) made[target - i] -= labels;
        if (cap != 0) {
            const F t = hyperbolic_tangent(load_at<T>(p, i, count) / cap);
            made = made * (1.0f - t * t);
        }
        store<T>(p + i * width<T>(), made, std::min(LANES, count - i));
    }
}

// e^(from - most), and its sum.
double exponentials(const Row& from, float most, Row& to) {
    Sum sum;
    each(from, {&sum}, [&](int64_t i) {
        const F e = exponential(from.get(i) - most);
        to.put(i, e), sum.add(i, e);
    });
    return sum.value;
}

// Of both models' logits, divided by the temperature.
struct Compared {
    double own, theirs;          // sums of the exponentials below the largest
    double log_own, log_theirs;  // logsumexp
    double divergence, inside;   // Jensen-Shannon: inside is KL(q || m)
};

// y becomes e^y below its largest; z what the gradient needs: e^z, for reverse the difference, for Jensen-Shannon q log(q / m).
Compared compare(int kind, float by, Row& y, float most, Row& z, float highest) {
    Sum own, theirs, product;
    each(y, {&own, &theirs, &product}, [&](int64_t i) {
        const F difference = (z.get(i) - y.get(i)) * by;
        const F p = exponential((z.get(i) - highest) * by), q = exponential((y.get(i) - most) * by);
        own.add(i, q), theirs.add(i, p), product.add(i, (kind == FORWARD ? p : q) * difference);
        y.put(i, q), z.put(i, kind == REVERSE ? difference : p);
    });
    Compared made{own.value, theirs.value, most * double(by) + std::log(own.value), highest * double(by) + std::log(theirs.value), 0, 0};
    if (kind == FORWARD) made.divergence = product.value / made.theirs - made.log_theirs + made.log_own;
    if (kind == REVERSE) made.divergence = made.log_theirs - made.log_own - product.value / made.own;
    if (kind != JENSEN_SHANNON) return made;
    Sum mine, other;
    const float q_scale = float(1 / made.own), p_scale = float(1 / made.theirs);
    const F tiny = splat(0x1p-126f);
    each(y, {&mine, &other}, [&](int64_t i) {
        const F p = z.get(i) * p_scale, q = y.get(i) * q_scale, middle = (p + q) * 0.5f;
        const F log_middle = logarithm(middle > tiny ? middle : tiny);
        const F from = q * (logarithm(q > tiny ? q : tiny) - log_middle);
        mine.add(i, from), other.add(i, p * (logarithm(p > tiny ? p : tiny) - log_middle));
        z.put(i, from);
    });
    made.divergence = (mine.value + other.value) / 2, made.inside = mine.value;
    return made;
}

// Against all of a teacher's logits, or none. The rows are those of one task; `soft` is for softmax(y) where the temperature is not 1.
template <int T> void judge_row(const Judged& job, int64_t row, Row& y, Row& z, Row& soft) {
    const int64_t target = job.targets[row], count = job.vocabulary;
    char* const student = job.student + row * count * width<T>();
    double* const made = job.made + row * 3;
    read_row<T>(student, count, job.cap, y);
    const float most = most_of(y), labels = target >= 0 ? job.labels : 0;
    const double answer = target >= 0 ? y.at[target] : 0;
    const int64_t likeliest = first_of(y, most);
    const bool apart = job.temperature != 1 || !job.teacher;
    Row& whole = apart && job.teacher ? soft : y;  // softmax(y), but for its sum
    double entire = apart ? exponentials(y, most, whole) : 0;
    Compared found{1, 1, 0, 0, 0, 0};
    made[2] = 0;
    if (job.teacher) {
        read_row<T>(job.teacher + row * count * width<T>(), count, job.teacher_cap, z);
        const float highest = most_of(z);
        made[2] = likeliest < count && likeliest == first_of(z, highest);
        found = compare(job.kind, 1.0f / job.temperature, y, most, z, highest);
        if (!apart) entire = found.own;
    }
    made[0] = found.divergence, made[1] = target >= 0 ? most + std::log(entire) - answer : 0;
    if (!job.gradient) return;
    const double size = (1 - double(job.labels)) * job.temperature;
    const F label = splat(float(labels / entire)), own = splat(float(size / found.own)), theirs = splat(float(size / found.theirs));
    const auto write = [&](auto slope) {
        write_row<T>(student, count, job.cap, target, labels, [&](int64_t i) { return slope(i) + whole.get(i) * label; });
    };
    if (!job.teacher) {
        write([&](int64_t) { return F{}; });
    } else if (job.kind == FORWARD) {
        write([&](int64_t i) { return y.get(i) * own - z.get(i) * theirs; });
    } else if (job.kind == REVERSE) {
        const F less = splat(float(found.log_theirs - found.log_own - found.divergence));
        write([&](int64_t i) { return y.get(i) * own * (less - z.get(i)); });
    } else {
        const F half = splat(float(size / 2)), inside = splat(float(size / 2 * found.inside / found.own));
        write([&](int64_t i) { return z.get(i) * half - y.get(i) * inside; });
    }
}

// Of two distributions over n bins, given as log_softmax: D, and its gradient by what log_q is the log_softmax of.
double between(int kind, int64_t n, const double* log_p, const double* log_q, double* slope) {
    double sum = 0, own = 0;
    for (int64_t b = 0; b < n; b++) {
        const double p = std::exp(log_p[b]), q = std::exp(log_q[b]);
        if (kind == FORWARD) {
            sum += p * (log_p[b] - log_q[b]), slope[b] = q - p;
        } else {
            const double top = std::max(log_p[b], log_q[b]), low = std::min(log_p[b], log_q[b]);
            const double middle = kind == REVERSE ? log_p[b] : top + std::log1p(std::exp(low - top)) - std::log(2.0);
            slope[b] = q * (log_q[b] - middle), own += slope[b];
            if (kind == JENSEN_SHANNON) sum += p * (log_p[b] - middle);
        }
    }
    if (kind == FORWARD) return sum;
    const double part = kind == REVERSE ? 1 : 0.5;
    for (int64_t b = 0; b < n; b++) slope[b] = part * (slope[b] - own * std::exp(log_q[b]));
    return kind == REVERSE ? own : (sum + own) / 2;
}

// values / by as log_softmax.
void normalize(std::vector<double>& values, double by) {
    double most = -INFINITY, sum = 0;
    for (double& value : values) value /= by, most = std::max(most, value);
    for (double value : values) sum += std::exp(value - most);
    for (double& value : values) value -= most + std::log(sum);
}

template <int T> void judge_bins(const Judged& job, int64_t row, Row& y) {
    const int64_t target = job.targets[row], count = job.vocabulary, k = job.k;
    const int32_t* const at = job.indices + row * k;
    char* const student = job.student + row * count * width<T>();
    double* const made = job.made + row * 3;
    read_row<T>(student, count, job.cap, y);
    const int64_t likeliest = first_of(y, most_of(y));
    const double answer = target >= 0 ? y.at[target] : 0;
    std::vector<double> known(job.known + row * k, job.known + (row + 1) * k), bins(k + 1), slope(k + 1);
    known.push_back(job.rest[row]);
    for (int64_t b = 0; b < k; b++) bins[b] = y.at[at[b]], y.at[at[b]] = NOWHERE;
    const float most = most_of(y);
    const double rest = exponentials(y, most, y);
    bins[k] = most + std::log(rest);
    std::vector<double> plain = bins;
    normalize(plain, 1);
    const double entire = bins[k] - plain[k];  // logsumexp of all
    normalize(bins, job.temperature), normalize(known, job.temperature);
    made[0] = between(job.kind, k + 1, known.data(), bins.data(), slope.data());
    made[1] = target >= 0 ? entire - answer : 0;
    made[2] = likeliest == at[0];
    if (!job.gradient) return;
    const double size = (1 - double(job.labels)) * job.temperature, labels = target >= 0 ? job.labels : 0;
    const F scale = splat(float((size * slope[k] + labels * std::exp(plain[k])) / rest));
    for (int64_t i = 0; i < y.padded; i += LANES) y.put(i, y.get(i) * scale);
    for (int64_t b = 0; b < k; b++) y.at[at[b]] = float(size * slope[b] + labels * std::exp(plain[b]));
    write_row<T>(student, count, job.cap, target, float(labels), [&](int64_t i) { return y.get(i); });
}

template <int T> void judge(const Judged& job, int threads) {
    const int64_t together = std::max<int64_t>(1, job.n / (4 * threads));  // rows that share a task's memory
    parallel((job.n + together - 1) / together, threads, [&](int64_t task) {
        const bool dense = !job.indices;
        const int64_t second = job.teacher ? job.vocabulary : 0, third = job.temperature != 1 ? second : 0;
        Row y(job.vocabulary), z(second), soft(third);
        for (int64_t row = task * together; row < std::min(job.n, (task + 1) * together); row++)
            if (dense) judge_row<T>(job, row, y, z, soft);
            else judge_bins<T>(job, row, y);
    });
}

void judge_as(int dtype, const Judged& job, int threads) {
    if (dtype == BF16) judge<BF16>(job, threads);
    if (dtype == FP16) judge<FP16>(job, threads);
    if (dtype == FP32) judge<FP32>(job, threads);
}

}  // namespace

// made: [n, 3] as `token_divergence.divergence` has them; teacher may be null, a cap is 0 where there is none.
extern "C" void kompressor_divergence(void* student, const void* teacher, int dtype, const int64_t* targets, int64_t n, int64_t vocabulary,
                                      int kind, float temperature, float labels, float cap, float teacher_cap, int gradient, int threads,
                                      double* made) {
    const Judged job{static_cast<char*>(student), static_cast<const char*>(teacher), nullptr, nullptr, nullptr, targets, n, vocabulary, 0,
                     kind, temperature, labels, cap, teacher_cap, gradient != 0, made};
    judge_as(dtype, job, threads);
}

extern "C" void kompressor_top_k_divergence(void* student, int dtype, const int32_t* indices, const float* known, const float* rest,
                                            const int64_t* targets, int64_t n, int64_t vocabulary, int64_t k, int kind, float temperature,
                                            float labels, float cap, int gradient, int threads, double* made) {
    const Judged job{static_cast<char*>(student), nullptr, indices, known, rest, targets, n, vocabulary, k,
                     kind, temperature, labels, cap, 0, gradient != 0, made};
    judge_as(dtype, job, threads);
}
