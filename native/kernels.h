// What a level offers: a table of functions over plain structures. Drivers (native/*.cpp) prepare the structures, split the
// work over threads and own all memory; kernels (native/kernels/*.cpp) are compiled once per level.
#pragma once
#include "offset_tile.h"
#include "view.h"

namespace sieve {

constexpr int PANEL_KEYS = 16;  // keys are packed in panels of 16, so every block size is a list of panels
constexpr int MAX_ROWS = 64;    // query rows that one tile kernel call takes
constexpr int CHUNK_PANELS = 8; // panels that are softmaxed together
constexpr int SOFTMAX_BYTES = MAX_ROWS * 4 * (2 + 16);

// One tile of query rows and the key panels that it reads. Rows may belong to several heads of one group.
struct Tile {
  int32_t rows;              // 1..MAX_ROWS
  int32_t d, dv;             // channels of keys and of values
  const void* q;             // rows of fp32 [rows][d], or of bf16 [rows up to a multiple of 16][d up to a multiple of 32]
  int64_t q_stride;          // between rows of q
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
  const void* v;             // values of this head: rows or panels of fp32 (see Kernels), or packed pairs of panels
  int64_t v_stride;          // between rows of fp32 values
  int64_t kv_len;
  float scale, softcap;      // softcap 0: none
  bool sanitize;             // values may hold NaN or infinities: hide those that no row attends to
  float* o;                  // [rows up to 16][dv up to 16] unnormalised output
  float* m;                  // [rows] reference exponent, in units of 1 / (scale * log2 e)
  float* l;                  // [rows] sum of 2^(s - m)
  void* softmax;             // SOFTMAX_BYTES that attend_part keeps from call to call, 64-byte aligned
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

// Keys or values of one head where they lie: one array, or pages that a table lists.
struct Lines {
  const char* data;       // key 0, or page 0 of the cache
  DType dtype;
  int64_t width;          // channels, side by side
  int64_t stride;         // bytes from key to key
  const int32_t* table;   // [pages of this sequence], or null where the keys lie in one array
  int64_t page_size, page_stride;  // keys of a page; bytes from page to page
};

// A tile whose keys and values are read in place (k, v, v_stride of the tile are unused), over a part of its panels. The first
// `rows` logits of a bf16 tile come 16 rows at a time: q is packed [rows / 16][d / 32][16 channel pairs][16 rows][2].
struct LineTile {
  Tile tile;
  Lines k, v;
};

constexpr int SCAN_PANELS = 4;  // panels that are scanned together
constexpr int SCAN_CHUNK = SCAN_PANELS * PANEL_KEYS;
constexpr int SCAN_ROWS = 4;    // query rows of a group; every group has its own columns
constexpr int SCAN_DIGIT = 254; // a digit of a query counts as many of the next

// Rounded queries of one KV head against bit planes of its keys. A query is a sum of `digits` rows of integers; row r of group g
// and digit e is row (g * digits + e) * SCAN_ROWS + r of everything below.
struct Scan {
  int32_t d, groups, digits;
  int32_t rows;            // that there are; the others up to a multiple of SCAN_ROWS are zero
  int32_t bits;            // planes that are read
  const void* query;       // as pack_scan made it
  const float* factor;     // [groups][digits][SCAN_ROWS] base-2 logits of one unit of twice an integer dot, before the key's scale;
                           // of a digit, 1 / SCAN_DIGIT of that of the digit before
  const int32_t* centre;   // [groups][digits][SCAN_ROWS] (2^bits - 1) * sum of the integers
  const uint8_t* planes[8];   // plane p of key 0, most significant first
  int64_t key_stride;      // bytes from key to key
  const uint16_t* scale;   // fp16 scale of key 0
  int64_t scale_stride;    // elements
  float softcap;           // natural logits; 0: none
  int64_t kv_len;
  const int64_t* low;      // [groups * SCAN_ROWS] the row sees keys low..high-1
  const int64_t* high;
  const uint8_t* key_mask; // bool of key 0, or null
  int64_t key_mask_stride;
};

struct RowSource;    // rows.h
struct RowTask;
struct TopKTile;     // top_k.h
struct BlockBounds;
struct TernaryTask;  // ternary.h
// A run of key blocks of one head, summarised; null outputs are not computed. Layouts as in types/geometry.py.
struct KeyRun {
  const View* key;             // [batch, kv_heads, kv_len, d]
  int64_t b, h, first, last;   // blocks first..last-1
  int64_t block_size;
  const uint8_t* part;         // [kv_len] 0 where a key takes no part, or null
  int32_t d, bits;             // bits 0: no sketch
  const float* channel_scale;  // [d]
  int32_t* count;              // [blocks], all of this head
  uint8_t* finite;
  float* mean;                 // [blocks][d]
  float* key_norm;
  float* radius;
  float* low;
  float* high;
  uint8_t* planes;             // of this head; the next plane is plane_stride bytes on
  int64_t plane_stride;
  uint16_t* scale;             // [kv_len] fp16
  uint16_t* error;
  uint16_t* metric_error;
  float* spectral;
  float* metric_spectral;
  float* scratch;              // key_run_scratch floats, 64-byte aligned
};

constexpr int LANE_ROWS = 16;    // query rows that the gate scores side by side, one a lane
constexpr float LOWEST = -1e30f; // the estimate of a block that a query sees and of which nothing can be said

// Sixteen query rows and what each sees. Estimates lie [block][16]: a vector holds one block's estimate for every row.
struct Lanes {
  int64_t low[LANE_ROWS], high[LANE_ROWS];  // row i sees keys low[i]..high[i]-1
  int64_t all_low, all_high;                // what every row sees
  int64_t first, last;                      // blocks to score: those that some row sees
  int64_t kv_len, block_size;
  const uint8_t* part;                      // [kv_len] 0 where a key is masked, or null
  const int32_t* part_before;               // [kv_len + 1] how many keys before this one take part, or null
};

// Twice the level that an expanded code stands for. `plain`: Kernels::plain_codes.
inline int32_t twice_level(bool plain, int8_t code, int32_t bits) {
  if (plain) return 2 * static_cast<uint8_t>(code) - ((1 << bits) - 1);
  return bits == 8 ? 2 * code + 1 : code;
}

// Estimates of blocks from their keys: log2 sum 2^(factor * step_j * (row_j . q)), capped where asked.
struct KeyScore {
  Lanes lanes;
  const int8_t* codes;     // [kv_len up to 32, and 32 more][wide] what twice_level reads, or null: keys themselves
  int32_t bits;
  const View* key;         // read where codes is null
  int64_t b, h;
  const float* step;       // [kv_len up to 16] scale of each key; null: 1
  const float* shift;      // [kv_len up to 16] -1.5 * 2^23 * step
  const int32_t* origin;   // [as many as codes] bits of 1.5 * 2^23 less 128 times the sum of a key's codes; unread where codes are plain
  int32_t d, wide;         // wide: d up to a multiple of 64
  const int8_t* q_codes;   // [wide / 4][16][4], or null where queries are not rounded
  const float* q;          // [wide][16]
  const float* half;       // [16] half the sum of a row's integers, with q_codes and eight bits
  const float* factor;     // [16] to base-2 logits (with q_codes and eight bits, of products with code + 1/2)
  float softcap;           // natural logits; 0: none
  float* out;              // [last - first][16] base-2 logarithms
  float* scratch;          // key_score_scratch floats
};

// Brackets of block masses for proofs, as bounds.sketch_upper and sketch_lower, and estimates beside them.
struct KeyProof {
  KeyScore keys;              // with codes and step; `out` receives estimates; scratch: bracket_scratch floats
  const float* error;         // [kv_len up to 16] ||e_j||, ||e_j / a||
  const float* metric_error;
  const float* length;        // [kv_len up to 16] ||k^_j / a||, or null where queries are not rounded
  const float* spectral;      // [blocks] spectral norms of the errors, or null
  const float* metric_spectral;
  const float* key_norm;      // [blocks]
  const float* plain;         // [16] scale times ||q||, ||q a|| and ||q a - q^ a||, rounded up
  const float* stretched;
  const float* rest;
  float rounding;             // bounds.logit_margin of one unit of scale * ||q|| * ||k||
  float *upper, *lower;       // [last - first][16] base-2 logarithms
};

// Sixteen rows that stream blocks until what remains is proved to be little (6.2 and 6.3 of docs/math.md). Tables [blocks][16].
struct Proof {
  int64_t blocks;
  const float *upper, *lower, *estimate;  // base-2 logarithms, -inf where a row sees nothing
  const uint8_t* first;                   // [blocks] kept before all others
  float log_kappa;                        // log2(error / (1 - error))
  int32_t* priority;                      // bits of positive numbers; -1: nothing is seen
  float *dropped, *kept;                  // masses above 2^base: at least what dropping loses, at most what keeping keeps
  float base[LANE_ROWS];
  float room[LANE_ROWS];                  // what may be dropped for one unit of what is kept
  float sink[LANE_ROWS];                  // kept mass that is no key's
};

// Estimates of blocks from their means: scale * q.mean (+ reach * radius), capped, (+ addend). Natural logarithms.
struct BlockScore {
  Lanes lanes;
  const float* mean;       // [blocks][d]
  const float* radius;     // [blocks] or null
  const float* addend;     // [blocks] or null
  int32_t d;
  const float* q;          // [d][16]
  const float* reach;      // [16] scale * ||q||
  float scale, softcap;
  float* out;              // [last - first][16]
};

struct Kernels {
  bool multiplies_bf16;  // whether attend_bf16 exists
  bool bf16_lines;       // whether attend_lines_bf16 exists (AMX)
  bool value_panels;     // whether `attend` reads values in panels, else in rows

  // packing of panels first..last-1 of one head [kv_len][d]
  void (*pack_keys)(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, float* out);         // [panel][d][16]
  void (*pack_values)(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, float* out);       // [panel][dv up to 16 / 16][16 keys][16]
  void (*pack_keys_bf16)(const View& k, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out); // [panel][d/32][16][16][2]
  void (*pack_values_bf16)(const View& v, int64_t b, int64_t h, int64_t first, int64_t last, uint16_t* out);  // pairs of panels
  bool (*ordinary_bf16)(const View& x, int64_t b, int64_t h);  // whether no number of a head of bf16 is denormal or beyond 2^64
  void (*read_rows)(const View& x, int64_t b, int64_t h, int64_t first, int64_t last, int64_t padded, bool clean, float* out);

  void (*attend)(const Tile& t);
  // the same in several calls, each on a part of the panels that is a multiple of CHUNK_PANELS but for the last; not with sanitize
  void (*attend_part)(const Tile& t, bool begins, bool ends);
  void (*attend_bf16)(const Tile& t);
  int64_t (*tile_scratch)(int32_t d, int32_t dv, bool bf16);
  // o / l into `out` (a row of `dtype`), natural lse returned; sink: natural logit or -inf
  float (*finish_row)(const Tile& t, int row, float sink, void* out, int64_t stride, DType dtype);
  bool (*all_finite)(const float* x, int64_t n);
  void (*write_row)(const float* x, int64_t n, void* out, int64_t stride, DType dtype);

  void (*attend_lines)(const LineTile& t);       // o [rows][dv up to 16]
  void (*attend_lines_bf16)(const LineTile& t);  // AMX; d a multiple of 32
  int64_t (*lines_scratch)(int32_t d, int32_t dv);
  void (*pack_rows_bf16)(const View& q, int64_t b, const int64_t* head, const int64_t* query, int rows, uint16_t* out);
  // the (o, m, l) of `parts` tiles over different keys of the same rows, added up into the first; each o follows the last
  void (*merge)(const Tile& t, int parts, float* o, float* m, float* l);

  // integers [groups][digits][SCAN_ROWS][d], which are `rows` rows, packed for planes of `bits` bits
  int64_t (*scan_bytes)(int32_t d, int32_t rows);
  void (*pack_scan)(const int8_t* q, int32_t d, int32_t rows, int32_t digits, int32_t bits, void* out);
  // base-2 log mass of the visible keys of `chunks` x SCAN_PANELS panels from `first`: mass [panel][groups][SCAN_ROWS] (of this
  // call), with `norms` the 2-norm of each panel's weights as a share of their sum, and the largest key scale of each panel; `scratch` holds scan_scratch bytes
  void (*scan)(const Scan& s, int64_t first, int64_t chunks, float* mass, float* norms, float* largest, void* scratch);
  int64_t (*scan_scratch)(int32_t d, int32_t rows);
  // dots [count][rows up to SCAN_ROWS] of items of `d` floats with rows of queries
  void (*dot_rows)(const float* q, int32_t rows, int32_t d, const void* items, DType dtype, int64_t stride, int64_t count, float* out);

  // tables [n][rows] of base-2 log masses, rows a multiple of SCAN_ROWS
  void (*fold)(const float* mass, int64_t n, int64_t each, int64_t rows, float* out);  // n panels to ceil(n / each) blocks
  void (*row_mass)(const float* mass, int64_t n, int64_t rows, float* out);            // [rows] the log mass of everything
  // [n] the largest of mass - base over the rows
  void (*best_row)(const float* mass, const float* base, int64_t n, int64_t rows, float* out);
  void (*powers)(const float* mass, const float* base, int64_t n, int64_t rows, float* out);  // 2^(mass - base)
  // for each row: the sum of `upper` where it is at most `level`, and of `lower` elsewhere
  void (*split)(const float* upper, const float* lower, const float* level, int64_t n, int64_t rows, float* below, float* above);

  void (*gradient)(const TileGradient& g);
  int64_t (*gradient_scratch)(int32_t d, int32_t dv);

  // lists of single keys (rows.h)
  void (*row_dots)(const RowTask& t);  // t.s = q . k_j
  // from products to the output row `out`; returns the natural lse; o: scratch of dv up to a multiple of 16
  float (*row_attend)(const RowTask& t, float sink, float* o, void* out, int64_t stride, DType dtype);
  // from products to weights (t.s), gradients of biased logits (pull) and of products (slope)
  void (*row_slopes)(const RowTask& t, float lse, float shift, const float* d_out, float* pull, float* slope);
  // out += sum_j weight_j * row index_j; `clean`: non-finite entries count as zero; copy: scratch for one row
  void (*row_sum)(const RowSource& x, const int32_t* index, const float* weight, int64_t n, bool clean, float* out, float* copy);
  void (*row_bias)(const char* bias, int64_t stride, DType dtype, const int32_t* key, int64_t n, float* out);

  // top-k (top_k.h)
  void (*top_k)(const TopKTile& t);
  float (*top_k_product)(uint64_t rank);  // the product in a rank
  void (*block_bounds)(const BlockBounds& x);  // centre and reach
  void (*upper_bounds)(const BlockBounds& x);  // upper and priority

  // ternary weights (ternary.h)
  bool ternary_tiles;             // whether many tokens are multiplied by tiles (AMX)
  int64_t ternary_few_tokens;     // up to so many go by tables
  int64_t ternary_many_blocks;    // row blocks that ternary_many takes
  int64_t ternary_scratch_floats; // scratch of ternary_many
  int64_t (*ternary_table_floats)(int64_t groups);  // of a token of so many groups of columns
  void (*ternary_tables)(const float* x, int64_t groups, int64_t fewest, float* tables);
  void (*ternary_few)(const TernaryTask& t);   // x: tables
  void (*ternary_split)(const float* x, int64_t stride, int64_t rows, int64_t groups, int64_t parts, uint16_t* out);
  void (*ternary_many)(const TernaryTask& t);  // x: fp32 rows, or what ternary_split wrote
  float (*ternary_round)(const float* x, int64_t n, int8_t* q);  // to 8 bits; returns the scale
  // alpha * scale * sums as a row of the output; line: scratch of n floats
  void (*ternary_write)(const void* sums, bool integer, int64_t n, const float* alpha, int64_t alpha_stride, float scale, float* line,
                        void* out, int64_t stride, DType dtype);
  void (*ternary_few_int8)(const TernaryTask& t);   // x: int8 rows
  void (*ternary_many_int8)(const TernaryTask& t);  // x: int8 tiles of 16 tokens and 64 columns

  // h_t = a * h_(t-1) + x_t over `channels` side by side; steps in elements, negative ones go back in time
  void (*diagonal_scan)(const float* x, int64_t x_step, const float* a, const float* start, float* out, int64_t out_step,
                        int64_t length, int64_t channels);

  // geometry
  void (*channel_scale)(const View& key, int64_t b, int64_t h, const uint8_t* part, float* out);
  void (*summarise)(const KeyRun& run);
  int64_t (*key_run_scratch)(int64_t block_size, int32_t d);

  // gate
  int32_t integer_bits;  // of codes that rounded queries of the sketch meet in integer dot products (8: AMX, VNNI; 7: AVX2; 0: none)
  bool plain_codes;      // whether expanded codes are 0 to 2^bits - 1, else twice the level, less one where bits are 8
  void (*expand_codes)(const uint8_t* planes, int64_t plane_stride, int32_t sketch_bits, int32_t bits, int64_t keys, int32_t d,
                       int32_t wide, int8_t* out, int32_t* origin);  // origin: of KeyScore
  void (*read_steps)(const uint16_t* scale, int64_t keys, float by, float* step, float* shift);
  // Query rows [16] as lanes: times `stretch` where given, rounded to integers of at most 127 where asked. `panel` [wide][16] or
  // null, `codes` [wide / 4][16][4] or null; `step` what one integer stands for (1 if not rounded), NaN where a row is not
  // finite and stretched; `norm` ||q|| or null.
  void (*prepare_lanes)(const View& q, int64_t b, const int64_t* head_of, const int64_t* query_of, int32_t rows, const float* stretch,
                        bool round, int32_t d, int32_t wide, float* panel, int8_t* codes, float* step, float* norm);
  void (*score_keys)(const KeyScore& s);
  int64_t (*key_score_scratch)(int64_t block_size, int32_t wide);
  void (*score_blocks)(const BlockScore& s);
  // best[i] = max(best[i], the largest share over the lanes); `unit` turns an estimate into a base-2 logarithm
  void (*largest_share)(const float* estimate, int64_t blocks, float unit, float* best);
  void (*largest)(const float* estimate, int64_t blocks, float* best);               // best[i] = max(best[i], over the lanes)
  void (*mark_above)(const float* estimate, int64_t blocks, float margin, uint8_t* marks);  // within margin of the lane's best
  void (*mark_mass)(const float* estimate, int64_t blocks, float unit, float mass, int32_t lanes, uint8_t* marks,
                    float* weights);  // weights: blocks * 17 floats
  // marks the k largest of n numbers, none NaN, 1 <= k <= n; of equal ones the earliest; x is overwritten
  void (*mark_largest)(float* x, int64_t n, int64_t k, uint8_t* marks);

  // proofs
  void (*bracket_keys)(const KeyProof& p);
  int64_t (*bracket_scratch)(int64_t block_size, int32_t wide);
  // upper and lower about the estimates in keys.out; error, metric_error and length are the largest of each block
  void (*widen)(const KeyProof& p);
  void (*weigh)(Proof& p);  // tables and base, with what brackets alone say is kept
  // what blocks first..last-1 hold at least, from estimates [last - first][16] made of the keys themselves
  void (*weigh_kept)(const Proof& p, const float* exact, int64_t first, int64_t last);
  // marks what the first `lanes` rows keep; of equal priorities all, or with `ties` the earliest that suffice; list [blocks]
  void (*stop_streams)(const Proof& p, int32_t lanes, bool ties, uint8_t* marks, int32_t* list);

  // offsets (offset_tile.h)
  void (*attend_offsets)(const OffsetTile& t);
  void (*gradient_offsets)(const OffsetGradient& g);
};

static inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace sieve
