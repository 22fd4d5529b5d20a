// The parts of a layer between its products, forward and back, for training: each reads and writes its rows once.
//
// Included once per instruction set, after vector.inl.

// A vector at every place of a row; the last may be short, and is filled up with zeros.
template <typename Body>
static inline void along(long size, Body body) {
    for (long j = 0; j < size; j += WIDTH) body(j, size - j < WIDTH ? size - j : WIDTH);
}
static inline Vector load_some(const float *at, long count) {
    if (count == WIDTH) return load(at);
    Vector value{};
    for (long i = 0; i < count; i++) value[i] = at[i];
    return value;
}
static inline void store_some(float *at, Vector value, long count) {
    if (count == WIDTH) return store(at, value);
    for (long i = 0; i < count; i++) at[i] = value[i];
}

// y = x * inverse * weight, where inverse[r] = 1 / sqrt(mean of the row's squares + eps).
static void norm_forward(const float *x, const float *weight, long rows, long size, float eps, float *y, float *inverse) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *row = x + r * size;
        Vector squares{};
        along(size, [&](long j, long count) {
            const Vector value = load_some(row + j, count);
            squares += value * value;
        });
        const float by = inverse[r] = 1 / sqrtf(sum_of(squares) / size + eps);
        along(size, [&](long j, long count) {
            store_some(y + r * size + j, load_some(row + j, count) * by * load_some(weight + j, count), count);
        });
    }
}

// dx; and dweight in parts [parts, size], whose sum does not depend on the number of threads.
static void norm_backward(const float *x, const float *weight, const float *inverse, const float *y_grad, long rows,
                          long size, long parts, float *x_grad, float *weight_grads) {
    const long part_rows = (rows + parts - 1) / parts;
#pragma omp parallel for schedule(static)
    for (long part = 0; part < parts; part++) {
        float *weight_grad = weight_grads + part * size;
        memset(weight_grad, 0, size * sizeof(float));
        const long last = (part + 1) * part_rows < rows ? (part + 1) * part_rows : rows;
        for (long r = part * part_rows; r < last; r++) {
            const float *row = x + r * size, *grad = y_grad + r * size;
            const float by = inverse[r];
            Vector products{};
            along(size, [&](long j, long count) {
                const Vector value = load_some(row + j, count), scaled = load_some(grad + j, count) * value;
                products += scaled * load_some(weight + j, count);
                store_some(weight_grad + j, load_some(weight_grad + j, count) + scaled * by, count);
            });
            const float back = sum_of(products) * by * by * by / size;
            along(size, [&](long j, long count) {
                const Vector scaled = load_some(grad + j, count) * load_some(weight + j, count);
                store_some(x_grad + r * size + j, scaled * by - load_some(row + j, count) * back, count);
            });
        }
    }
}

// y = silu(gate) * up, where a row of `joint` is a gate and an up of `size` each.
static void swiglu_forward(const float *joint, long rows, long size, float *y) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *gate = joint + 2 * r * size, *up = gate + size;
        along(size, [&](long j, long count) {
            const Vector value = load_some(gate + j, count);
            store_some(y + r * size + j, value * logistic(value) * load_some(up + j, count), count);
        });
    }
}

static void swiglu_backward(const float *joint, const float *y_grad, long rows, long size, float *joint_grad) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *gate = joint + 2 * r * size, *up = gate + size, *grad = y_grad + r * size;
        float *gate_grad = joint_grad + 2 * r * size, *up_grad = gate_grad + size;
        along(size, [&](long j, long count) {
            const Vector value = load_some(gate + j, count), share = logistic(value), from = load_some(grad + j, count);
            store_some(gate_grad + j, from * load_some(up + j, count) * share * (1.0f + value * (1.0f - share)), count);
            store_some(up_grad + j, from * value * share, count);
        });
    }
}

// Turns the pairs (i, i + size / 2) of each head by its token's angle, or back. Tokens of x lie x_row apart, those of y
// are dense; cosines and sines are [tokens, size / 2].
static void rotate(const float *x, long x_row, const float *cosines, const float *sines, long tokens, long heads,
                   long size, bool back, float *y) {
    const float sign = back ? -1.0f : 1.0f;
    const long half = size / 2;
#pragma omp parallel for schedule(static)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            const float *from = x + t * x_row + h * size;
            float *to = y + (t * heads + h) * size;
            along(half, [&](long j, long count) {
                const Vector first = load_some(from + j, count), second = load_some(from + half + j, count);
                const Vector cosine = load_some(cosines + t * half + j, count);
                const Vector sine = load_some(sines + t * half + j, count) * sign;
                store_some(to + j, first * cosine - second * sine, count);
                store_some(to + half + j, second * cosine + first * sine, count);
            });
        }
}
