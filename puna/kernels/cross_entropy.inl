// Softmax cross-entropy of rows of logits, and its gradient in their place.
//
// Included once per instruction set, after vector.inl.
//
// A row is read from memory once and written once; the passes between find it in the cache of its core.

// losses[r] = logsumexp(row) - row[label]; row = softmax(row) - onehot(label).
static void cross_entropy(float *logits, long rows, long vocabulary, const long *labels, float *losses) {
#pragma omp parallel for schedule(static)
    for (long r = 0; r < rows; r++) {
        float *row = logits + r * vocabulary;
        const long whole = vocabulary / WIDTH * WIDTH;
        float highest = row[0];
        if (whole) {
            Vector best = load(row);
            for (long j = WIDTH; j < whole; j += WIDTH) {
                Vector next = load(row + j);
                best = next > best ? next : best;
            }
            highest = largest_of(best);
        }
        for (long j = whole; j < vocabulary; j++) highest = row[j] > highest ? row[j] : highest;
        const float label_logit = row[labels[r]] - highest;
        // Two sums, so that one addition need not wait for the other.
        Vector even{}, odd{};
        long j = 0;
        for (; j + 2 * WIDTH <= whole; j += 2 * WIDTH) {
            Vector first = exponential(load(row + j) - highest), second = exponential(load(row + j + WIDTH) - highest);
            store(row + j, first), store(row + j + WIDTH, second);
            even += first, odd += second;
        }
        for (; j < whole; j += WIDTH) {
            Vector value = exponential(load(row + j) - highest);
            store(row + j, value);
            even += value;
        }
        float denominator = sum_of(even + odd);
        for (; j < vocabulary; j++) {
            row[j] = exponential(Vector{} + (row[j] - highest))[0];
            denominator += row[j];
        }
        const float by = 1 / denominator;
        for (j = 0; j < whole; j += WIDTH) store(row + j, load(row + j) * by);
        for (; j < vocabulary; j++) row[j] *= by;
        row[labels[r]] -= 1;
        losses[r] = logf(denominator) - label_logit;
    }
}
