// Paged decode attention that follows the block table and reads K and V once; native.py is its caller.
//
// A unit of work is one KV head of one row over a segment of its tokens, which lies in the second-level cache while
// the query heads that share it take turns. Segments are merged by their log-sum-exp. Segments are counted from the
// row's first token and merged in order, so a row's bits depend on no neighbour, no thread and no place in the pool.

#include <cmath>

#include "simd.h"

struct Call {
  const float* q;  // [rows, n_heads, dim]
  const void *k, *v;
  int64_t k_page, k_token, k_head, v_page, v_token, v_head;  // strides, in elements; those of dim are 1
  const int32_t* table;                                      // [rows, groups, width]
  const int32_t* lens;                                       // [rows, groups]
  const float* sinks;                                        // [n_heads] or null
  float* out;                                                // [rows, n_heads, dim]
  float* logits;    // [rows, n_heads, width * page_size] or null
  float* lse;       // [rows, n_heads] or null
  float* partials;  // [rows, segments, n_heads, 2 + dim]: largest logit, sum of weights, weighted sum of V
  int64_t rows, n_heads, n_kv, groups, n_pages, width, page_size, dim, segments, threads;
  float scale;
  int32_t is_bf16;
};

namespace {

constexpr int SEGMENT = 512;  // tokens; as in native.py
constexpr int TILE = 4;       // query heads whose sums fit the registers
constexpr int AHEAD = 24;     // tokens whose bytes are fetched early: where the next page lies, no processor guesses
constexpr int FAR = 128;      // tokens whose address is translated early

template <typename T>
void prefetch(const T* token, int dim) {
  for (int d = 0; d < dim; d += 64 / sizeof(T)) __builtin_prefetch(token + d);
}

// Logits of HEADS query heads over `count` tokens, scaled, -inf up to the next full vector.
template <typename T, int DIM, int HEADS>
void multiply(const Call& c, const float* q, const T* k, const int64_t* at, int count, float (*w)[SEGMENT]) {
  const int dim = DIM ? DIM : int(c.dim), whole = dim / LANES * LANES;
  for (int t = 0; t < count; t += LANES) {
    vec sums[HEADS][LANES];
    for (int i = 0; i < LANES; i++) {
      const T* token = k + at[t + i < count ? t + i : count - 1];
      if (t + i + AHEAD < count) prefetch(k + at[t + i + AHEAD], dim);
      if (i == 0 && t + FAR < count) __builtin_prefetch(k + at[t + FAR]);
      vec products[HEADS] = {};
      for (int d = 0; d < whole; d += LANES) {
        const vec x = load(token + d);
        for (int h = 0; h < HEADS; h++) products[h] += x * load(q + h * dim + d);
      }
      for (int d = whole; d < dim; d++)
        for (int h = 0; h < HEADS; h++) products[h][0] += value(token + d) * q[h * dim + d];
      for (int h = 0; h < HEADS; h++) sums[h][i] = products[h];
    }
    for (int h = 0; h < HEADS; h++) {
      for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) sums[h][i] = fold(sums[h][2 * i], sums[h][2 * i + 1]);
      store(&w[h][t], sums[h][0] * c.scale);
    }
  }
  for (int h = 0; h < HEADS; h++)
    for (int t = count; t % LANES; t++) w[h][t] = -INF;
}

// Logits become weights; the head's partial gets the largest logit and the sum of the weights.
void soften(float* w, int count, float* partial) {
  vec tops = load(w), sums = {};
  for (int t = LANES; t < count; t += LANES) tops = max(tops, load(w + t));
  const float top = max(tops);
  for (int t = 0; t < count; t += LANES) {
    const vec weight = exponential(load(w + t) - top);
    sums += weight;
    store(w + t, weight);
  }
  partial[0] = top;
  partial[1] = sum(sums);
}

// Sums of V by these weights, some vectors of the head's dimension at a time.
template <typename T, int DIM, int HEADS>
void combine(const Call& c, const T* v, const int64_t* at, int count, const float (*w)[SEGMENT], float* partial) {
  const int dim = DIM ? DIM : int(c.dim), whole = dim / LANES * LANES;
  constexpr int WIDE = DIM ? DIM / LANES : 1;
  for (int from = 0; from < whole; from += WIDE * LANES) {
    vec sums[HEADS][WIDE] = {};
    for (int t = 0; t < count; t++) {
      const T* token = v + at[t];
      if (from == 0 && t + AHEAD < count) prefetch(v + at[t + AHEAD], dim);
      if (from == 0 && t % 16 == 0 && t + FAR < count) __builtin_prefetch(v + at[t + FAR]);
      for (int i = 0; i < WIDE; i++) {
        const vec x = load(token + from + i * LANES);
        for (int h = 0; h < HEADS; h++) sums[h][i] += x * w[h][t];
      }
    }
    for (int h = 0; h < HEADS; h++)
      for (int i = 0; i < WIDE; i++) store(partial + h * (2 + dim) + 2 + from + i * LANES, sums[h][i]);
  }
  for (int h = 0; h < HEADS; h++)
    for (int d = whole; d < dim; d++) {
      float total = 0;
      for (int t = 0; t < count; t++) total += value(v + at[t] + d) * w[h][t];
      partial[h * (2 + dim) + 2 + d] = total;
    }
}

template <typename T, int DIM, int HEADS>
void attend(const Call& c, int64_t row, int64_t kv_head, int64_t head, int64_t first, int count, const int64_t* k_at,
            const int64_t* v_at, float* partial) {
  alignas(64) float w[HEADS][SEGMENT];
  const float* q = c.q + (row * c.n_heads + head) * c.dim;
  multiply<T, DIM, HEADS>(c, q, (const T*)c.k + kv_head * c.k_head, k_at, count, w);
  for (int h = 0; h < HEADS; h++) {
    if (c.logits)
      std::memcpy(c.logits + (row * c.n_heads + head + h) * c.width * c.page_size + first, w[h], count * sizeof(float));
    soften(w[h], count, partial + h * (2 + c.dim));
  }
  combine<T, DIM, HEADS>(c, (const T*)c.v + kv_head * c.v_head, v_at, count, w, partial);
}

// False if the row has more tokens than its table has room for, or the table names a page that does not exist.
template <typename T, int DIM>
bool unit(const Call& c, int64_t row, int64_t kv_head, int64_t segment) {
  const int64_t list = row * c.groups + kv_head / (c.n_kv / c.groups), shared = c.n_heads / c.n_kv;
  const int64_t first = segment * SEGMENT, left = c.lens[list] - first;
  if (left <= 0) return true;
  if (first + left > c.width * c.page_size) return false;
  const int count = left < SEGMENT ? int(left) : SEGMENT;
  const int32_t* page = c.table + list * c.width + first / c.page_size;
  int64_t k_at[SEGMENT], v_at[SEGMENT], slot = first % c.page_size;
  for (int t = 0; t < count; t++) {
    if (*page < 0 || *page >= c.n_pages) return false;
    k_at[t] = *page * c.k_page + slot * c.k_token;
    v_at[t] = *page * c.v_page + slot * c.v_token;
    if (++slot == c.page_size) slot = 0, page++;
  }
  for (int64_t head = kv_head * shared, end = head + shared; head < end; head += TILE) {
    float* partial = c.partials + ((row * c.segments + segment) * c.n_heads + head) * (2 + c.dim);
    switch (end - head) {
      case 1: attend<T, DIM, 1>(c, row, kv_head, head, first, count, k_at, v_at, partial); break;
      case 2: attend<T, DIM, 2>(c, row, kv_head, head, first, count, k_at, v_at, partial); break;
      case 3: attend<T, DIM, 3>(c, row, kv_head, head, first, count, k_at, v_at, partial); break;
      default: attend<T, DIM, TILE>(c, row, kv_head, head, first, count, k_at, v_at, partial);
    }
  }
  return true;
}

void merge(const Call& c, int64_t row, int64_t head) {
  const int64_t dim = c.dim, tokens = c.width * c.page_size, next = c.n_heads * (2 + dim);
  int64_t len = c.lens[row * c.groups + head / (c.n_heads / c.groups)];
  if (len > tokens) len = tokens;  // refused by `unit`
  const int64_t used = (len + SEGMENT - 1) / SEGMENT;
  const float* partials = c.partials + (row * c.segments * c.n_heads + head) * (2 + dim);
  float* out = c.out + (row * c.n_heads + head) * dim;
  float top = c.sinks ? c.sinks[head] : -INF;
  for (int64_t s = 0; s < used; s++) top = partials[s * next] > top ? partials[s * next] : top;
  float total = c.sinks ? std::exp(c.sinks[head] - top) : 0;
  for (int64_t d = 0; d < dim; d++) out[d] = 0;
  for (int64_t s = 0; s < used; s++) {
    const float* partial = partials + s * next;
    const float weight = std::exp(partial[0] - top);
    total += partial[1] * weight;
    for (int64_t d = 0; d < dim; d++) out[d] += partial[2 + d] * weight;
  }
  for (int64_t d = 0; d < dim && used; d++) out[d] /= total;
  if (c.lse) c.lse[row * c.n_heads + head] = used || c.sinks ? top + std::log(total) : -INF;
  if (c.logits)
    for (int64_t t = len; t < tokens; t++) c.logits[(row * c.n_heads + head) * tokens + t] = -INF;
}

template <typename T, int DIM>
bool run(const Call& c) {
  const int64_t units = c.rows * c.n_kv * c.segments, heads = c.rows * c.n_heads;
  int found = 1;
#pragma omp parallel num_threads(int(c.threads)) reduction(&& : found)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < units; u++)
      found = unit<T, DIM>(c, u / (c.n_kv * c.segments), u / c.segments % c.n_kv, u % c.segments) && found;
#pragma omp for schedule(static)
    for (int64_t u = 0; u < heads; u++) merge(c, u / c.n_heads, u % c.n_heads);
  }
  return found;
}

template <typename T>
bool run(const Call& c) {
  if (c.dim == 64) return run<T, 64>(c);
  if (c.dim == 128) return run<T, 128>(c);
  return run<T, 0>(c);
}

}  // namespace

// 0, or 1 if lengths and table do not hold together; then the outputs mean nothing.
extern "C" int deltakv_decode_attention(const Call* call) {
  return !(call->is_bf16 ? run<bf16>(*call) : run<float>(*call));
}
