// DELTA's page scores; native.py is its caller.

#include "simd.h"

// logits: [rows, tiles, n_heads, tile]; shift: [rows, tiles, n_heads], what makes them logarithms of probabilities;
// lens: [rows]; scores: [rows, width].
extern "C" void deltakv_page_scores(const float* logits, const float* shift, const int32_t* lens, float* scores,
                                    int64_t rows, int64_t tiles, int64_t n_heads, int64_t tile, int64_t width,
                                    int64_t page_size, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(int(threads))
  for (int64_t u = 0; u < rows * width; u++) {
    const int64_t row = u / width, first = u % width * page_size;
    const int64_t end = lens[row] < first + page_size ? lens[row] : first + page_size;
    vec total = {};
    for (int64_t t = first; t < end;) {
      const int64_t left = (end < (t / tile + 1) * tile ? end : (t / tile + 1) * tile) - t;
      const int64_t count = left < LANES ? left : LANES, list = (row * tiles + t / tile) * n_heads;
      // The largest probability is that of the largest logarithm: one exponential for all heads.
      vec top = (vec){} - INF;
      for (int64_t head = list; head < list + n_heads; head++) {
        const float* from = logits + head * tile + t % tile;
        vec logit = (vec){} - INF;
        if (count == LANES) logit = load(from);
        else std::memcpy(&logit, from, count * sizeof(float));
        top = max(top, logit + shift[head]);
      }
      total += exponential(top);
      t += count;
    }
    scores[u] = sum(total);
  }
}
