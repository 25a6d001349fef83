// DELTA's page scores; native.py is its caller.

#include "simd.h"

// logits: [rows, n_heads, width * page_size]; lse: [rows, n_heads]; lens: [rows]; scores: [rows, width].
extern "C" void deltakv_page_scores(const float* logits, const float* lse, const int32_t* lens, float* scores,
                                    int64_t rows, int64_t n_heads, int64_t width, int64_t page_size, int64_t threads) {
  const int64_t tokens = width * page_size;
#pragma omp parallel for schedule(static) num_threads(int(threads))
  for (int64_t u = 0; u < rows * width; u++) {
    const int64_t row = u / width, first = u % width * page_size, left = lens[row] - first;
    const int64_t count = left < page_size ? left : page_size;
    vec total = {};
    for (int64_t t = 0; t < count; t += LANES) {
      // The largest probability is that of the largest logit less its log-sum-exp: one exponential for all heads.
      vec top = (vec){} - INF;
      for (int64_t head = 0; head < n_heads; head++) {
        const float* from = logits + (row * n_heads + head) * tokens + first + t;
        vec logit = (vec){} - INF;
        if (count - t >= LANES) logit = load(from);
        else std::memcpy(&logit, from, (count - t) * sizeof(float));
        top = max(top, logit - lse[row * n_heads + head]);
      }
      total += exponential(top);
    }
    scores[u] = sum(total);
  }
}
