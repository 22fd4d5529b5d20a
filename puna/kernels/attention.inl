// Causal attention of documents that stand one after another in a batch, and its gradient, in float32.
//
// Included once per instruction set, after vector.inl.
//
// A work item is one document and one key/value head. Its keys (and in the gradient its values) are transposed once,
// so that every product below has the same form: rows of C gather weighted rows of a matrix M. Scores exist for a block
// of queries at a time, whole rows of them, so the softmax is the plain one.

// c[r, :] (+)= sum over j < count of weight[r * row + j * step] * m[j, :], for ROWS rows and COLUMNS vectors.
template <int ROWS, int COLUMNS, bool ADD>
static inline void tile(const float *weight, long row, long step, const float *m, long m_row, long count, float *c,
                        long c_row) {
    Vector sums[ROWS][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < COLUMNS; v++) sums[r][v] = ADD ? load(c + r * c_row + v * WIDTH) : Vector{};
    for (long j = 0; j < count; j++) {
        Vector values[COLUMNS];
#pragma GCC unroll 8
        for (int v = 0; v < COLUMNS; v++) values[v] = load(m + j * m_row + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            float by = weight[r * row + j * step];
#pragma GCC unroll 8
            for (int v = 0; v < COLUMNS; v++) sums[r][v] += by * values[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int v = 0; v < COLUMNS; v++) store(c + r * c_row + v * WIDTH, sums[r][v]);
}

template <int COLUMNS, bool ADD>
static void rows_of_tiles(const float *weight, long row, long step, const float *m, long m_row, long count, float *c,
                          long c_row, long rows) {
    long r = 0;
    for (; r + 6 <= rows; r += 6)
        tile<6, COLUMNS, ADD>(weight + r * row, row, step, m, m_row, count, c + r * c_row, c_row);
    const float *w = weight + r * row;
    float *o = c + r * c_row;
    switch (rows - r) {
    case 5: tile<5, COLUMNS, ADD>(w, row, step, m, m_row, count, o, c_row); break;
    case 4: tile<4, COLUMNS, ADD>(w, row, step, m, m_row, count, o, c_row); break;
    case 3: tile<3, COLUMNS, ADD>(w, row, step, m, m_row, count, o, c_row); break;
    case 2: tile<2, COLUMNS, ADD>(w, row, step, m, m_row, count, o, c_row); break;
    case 1: tile<1, COLUMNS, ADD>(w, row, step, m, m_row, count, o, c_row); break;
    }
}

// The same for any number of rows, and of columns that is a multiple of WIDTH.
template <bool ADD>
static void product(const float *weight, long row, long step, const float *m, long m_row, long count, float *c,
                    long c_row, long rows, long columns) {
    long at = 0;
    for (; at + 4 * WIDTH <= columns; at += 4 * WIDTH)
        rows_of_tiles<4, ADD>(weight, row, step, m + at, m_row, count, c + at, c_row, rows);
    switch ((columns - at) / WIDTH) {
    case 3: rows_of_tiles<3, ADD>(weight, row, step, m + at, m_row, count, c + at, c_row, rows); break;
    case 2: rows_of_tiles<2, ADD>(weight, row, step, m + at, m_row, count, c + at, c_row, rows); break;
    case 1: rows_of_tiles<1, ADD>(weight, row, step, m + at, m_row, count, c + at, c_row, rows); break;
    }
}

// to[k, j] = from[j, k] for j < count, k < size, a multiple of WIDTH; further columns up to padded(count) are zero.
static void transpose(const float *from, long from_row, long count, long size, float *to) {
    const long width = padded(count);
    for (long j = 0; j < width; j += WIDTH)
        for (long k = 0; k < size; k += WIDTH) {
            Vector square[WIDTH];
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) square[i] = j + i < count ? load(from + (j + i) * from_row + k) : Vector{};
            transpose(square);
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) store(to + (k + i) * width + j, square[i]);
        }
}

// scores[0 .. visible) become exp(scale * score - highest); what follows up to `width` becomes 0. Returns the sum.
static float exponentials(float *scores, long visible, long width, float scale, float highest) {
    Vector sums{};
    const long whole = visible / WIDTH * WIDTH;
    for (long j = 0; j < whole; j += WIDTH) {
        Vector value = exponential(load(scores + j) * scale - highest);
        store(scores + j, value);
        sums += value;
    }
    float total = sum_of(sums);
    if (whole < visible) store(scores + whole, exponential(load(scores + whole) * scale - highest));
    for (long j = whole; j < visible; j++) total += scores[j];
    for (long j = visible; j < width; j++) scores[j] = 0;
    return total;
}

static float highest_of(float *scores, long visible) {
    for (long j = visible; j < padded(visible); j++) scores[j] = scores[visible - 1];
    Vector best = load(scores);
    for (long j = WIDTH; j < padded(visible); j += WIDTH) {
        Vector next = load(scores + j);
        best = next > best ? next : best;
    }
    return largest_of(best);
}

static void forward(const Attention &a) {
#pragma omp parallel
    {
        const long widest = padded(a.longest);
        Scratch keys(a.size * widest), scores(QUERIES * widest);
#pragma omp for schedule(dynamic, 1) nowait
        for (long item = 0; item < a.documents * a.groups; item++) {
            const long group = item % a.groups, first = a.starts[item / a.groups];
            const long length = a.starts[item / a.groups + 1] - first, width = padded(length);
            transpose(a.k + first * a.k_row + group * a.size, a.k_row, length, a.size, keys.data);
            for (long head = group * a.heads / a.groups; head < (group + 1) * a.heads / a.groups; head++)
                for (long at = 0; at < length; at += QUERIES) {
                    const long rows = at + QUERIES < length ? QUERIES : length - at, seen = at + rows;
                    product<false>(a.q + (first + at) * a.q_row + head * a.size, a.q_row, 1, keys.data, width, a.size,
                                   scores.data, width, rows, padded(seen));
                    float *out = a.o + ((first + at) * a.heads + head) * a.size;
                    float totals[QUERIES];
                    for (long r = 0; r < rows; r++) {
                        float *row = scores.data + r * width;
                        const float highest = highest_of(row, at + r + 1) * a.scale;
                        totals[r] = exponentials(row, at + r + 1, padded(seen), a.scale, highest);
                        a.log_sum[(first + at + r) * a.heads + head] = highest + logf(totals[r]);
                    }
                    product<false>(scores.data, width, 1, a.v + first * a.v_row + group * a.size, a.v_row, seen, out,
                                   a.heads * a.size, rows, a.size);
                    for (long r = 0; r < rows; r++)
                        for (long i = 0; i < a.size; i += WIDTH) {
                            float *part = out + r * a.heads * a.size + i;
                            store(part, load(part) / totals[r]);
                        }
                }
        }
    }
}

static void backward(const Attention &a, const AttentionGradient &g) {
#pragma omp parallel
    {
        const long widest = padded(a.longest), o_row = a.heads * a.size, group_row = a.groups * a.size;
        Scratch keys(a.size * widest), values(a.size * widest);
        Scratch weights(QUERIES * widest), errors(QUERIES * widest);
#pragma omp for schedule(dynamic, 1) nowait
        for (long item = 0; item < a.documents * a.groups; item++) {
            const long group = item % a.groups, first = a.starts[item / a.groups];
            const long length = a.starts[item / a.groups + 1] - first, width = padded(length);
            const float *k = a.k + first * a.k_row + group * a.size;
            transpose(k, a.k_row, length, a.size, keys.data);
            transpose(a.v + first * a.v_row + group * a.size, a.v_row, length, a.size, values.data);
            float *k_grad = g.k + first * group_row + group * a.size, *v_grad = g.v + first * group_row + group * a.size;
            for (long j = 0; j < length; j++)
                for (long i = 0; i < a.size; i++) k_grad[j * group_row + i] = v_grad[j * group_row + i] = 0;
            for (long head = group * a.heads / a.groups; head < (group + 1) * a.heads / a.groups; head++)
                for (long at = 0; at < length; at += QUERIES) {
                    const long rows = at + QUERIES < length ? QUERIES : length - at, seen = at + rows;
                    const float *q = a.q + (first + at) * a.q_row + head * a.size;
                    const float *o = a.o + ((first + at) * a.heads + head) * a.size;
                    const float *o_grad = g.o + (first + at) * g.o_row + head * a.size;
                    product<false>(q, a.q_row, 1, keys.data, width, a.size, weights.data, width, rows, padded(seen));
                    product<false>(o_grad, g.o_row, 1, values.data, width, a.size, errors.data, width, rows,
                                   padded(seen));
                    for (long r = 0; r < rows; r++) {
                        Vector dots{};  // sum of o * dL/do: what the softmax's normalisation gives back
                        for (long i = 0; i < a.size; i += WIDTH) dots += load(o + r * o_row + i) * load(o_grad + r * g.o_row + i);
                        const float dot = sum_of(dots);
                        float *weight = weights.data + r * width, *error = errors.data + r * width;
                        exponentials(weight, at + r + 1, padded(seen), a.scale,
                                     a.log_sum[(first + at + r) * a.heads + head]);
                        for (long j = 0; j < padded(seen); j += WIDTH)
                            store(error + j, load(weight + j) * (load(error + j) - dot) * a.scale);
                    }
                    product<false>(errors.data, width, 1, k, a.k_row, seen,
                                   g.q + ((first + at) * a.heads + head) * a.size, o_row, rows, a.size);
                    product<true>(errors.data, 1, width, q, a.q_row, rows, k_grad, group_row, seen, a.size);
                    product<true>(weights.data, 1, width, o_grad, g.o_row, rows, v_grad, group_row, seen, a.size);
                }
        }
    }
}
