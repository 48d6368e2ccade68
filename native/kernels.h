// What a level offers: a table of functions over plain structures. Drivers (native/*.cpp) prepare the structures, split the
// work over threads and own all memory; kernels (native/kernels/*.cpp) are compiled once per level.
#pragma once
#include "offset_tile.h"
#include "view.h"

namespace sieve {

constexpr int PANEL_KEYS = 16;  // keys are packed in panels of 16, so every block size is a list of panels
constexpr int MAX_ROWS = 64;    // query rows that one tile kernel call takes
constexpr int CHUNK_PANELS = 8; // panels that are softmaxed together

// One tile of query rows and the key panels that it reads. Rows may belong to several heads of one group.
struct Tile {
  int32_t rows;              // 1..MAX_ROWS
  int32_t d, dv;             // channels of keys and of values
  const void* q;             // packed: fp32 [rows][d], or bf16 [rows up to a multiple of 16][d up to a multiple of 32]
  int32_t panels;
  const int32_t* panel;      // [panels] numbers of key panels, increasing
  const uint16_t* keep;      // [panels] bit i: key i of the panel is selected
  const uint16_t* row_keep;  // [panels][rows] the same for every row, or null
  bool rows_alone;           // row_keep is given and says everything: nothing else hides a key
  const uint8_t* masked;     // [panels] 0 where every row attends to every key of the panel
  const int64_t* low;        // [rows] the row sees keys low..high-1
  const int64_t* high;
  int64_t prefix;            // and of those only key < prefix or near_low <= key < near_high, where near_low is given
  const int64_t* near_low;   // [rows] or null
  const int64_t* near_high;
  const uint16_t* key_bits;  // by panel number: keys that are not padding, or null
  const char* const* mask_row;  // [rows] boolean masks, or null
  int64_t mask_stride;
  const char* const* bias_row;  // [rows] additive biases, or null
  int64_t bias_stride;
  DType bias_dtype;
  const void* k;             // packed keys of this head
  const void* v;             // values of this head: rows of fp32, or packed pairs of panels
  int64_t v_stride;          // between rows of fp32 values
  int64_t kv_len;
  float scale, softcap;      // softcap 0: none
  bool sanitize;             // values may hold NaN or infinities: hide those that no row attends to
  float* o;                  // [rows up to 16][dv up to 16] unnormalised output
  float* m;                  // [rows] reference exponent, in units of 1 / (scale * log2 e)
  float* l;                  // [rows] sum of 2^(s - m)
  void* scratch;             // tile_scratch bytes, 64-byte aligned
};

// Gradients of one tile. Same panels; P is computed again from lse.
struct TileGradient {
  Tile tile;                 // q fp32 [rows][d up to 16]; o, m, l unused; k packed panels as they are
  const float* lse;          // [rows] natural logarithm
  const float* shift;        // [rows] d lse - sum(dO * O)
  const float* d_out;        // [rows][dv up to 16]
  const float* q_clean;      // [rows][d up to 16] queries with non-finite entries zero
  const float* k_rows;       // keys as rows [kv_len][d up to 16], non-finite entries zero
  const float* v_panels;     // packed values [panel][dv][16], non-finite entries zero
  float* dq;                 // [rows][d up to 16], added to
  float* dk;                 // [kv_len][d up to 16], added to
  float* dv;                 // [kv_len][dv up to 16], added to
  char* const* d_bias_row;   // [rows] fp32, added to, or null
  int64_t d_bias_stride;
};

struct Kernels {
  bool bf16_tiles;  // whether attend_bf16 exists (AMX)

  // packing of panels first..last-1 of one head [kv_len][d]
  void (*pack_keys)(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, float* out);         // [panel][d][16]
  void (*pack_keys_bf16)(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out); // [panel][d/32][16][16][2]
  void (*pack_values_bf16)(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out);  // pairs of panels
  void (*read_rows)(const View& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t padded, bool clean, float* out);

  void (*attend)(const Tile& t);
  void (*attend_bf16)(const Tile& t);
  int64_t (*tile_scratch)(int32_t d, int32_t dv, bool bf16);
  // o / l into `out` (a row of `dtype`), natural lse returned; sink: natural logit or -inf
  float (*finish_row)(const Tile& t, int row, float sink, void* out, int64_t stride, DType dtype);
  bool (*all_finite)(const float* x, int64_t n);
  void (*write_row)(const float* x, int64_t n, void* out, int64_t stride, DType dtype);

  void (*gradient)(const TileGradient& g);
  int64_t (*gradient_scratch)(int32_t d, int32_t dv);

  void (*attend_offsets)(const OffsetTile& t);
  void (*gradient_offsets)(const OffsetGradient& g);
};

static inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace sieve
