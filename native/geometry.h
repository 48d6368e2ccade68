// Stage 1: summaries of key blocks and the key sketch, in one pass over the keys.
#pragma once
#include "view.h"

namespace sieve {

// Outputs are contiguous; those that are null are not computed. They are written whole, or, where `room_blocks` is not 0, have room
// for that many blocks and `room_keys` keys, of which those from block `first_block` on are written: the keys that are given.
struct GeometryTask {
  View key;       // [batch, kv_heads, kv_len, d]
  View key_mask;  // [batch, kv_len] in shape[0], shape[3]; data null if absent
  int64_t block_size;
  int32_t bits;         // of the sketch; 0: none
  bool scale_is_given;  // channel_scale is read, not written
  int threads;
  int64_t first_block, room_blocks, room_keys;
  int32_t* count;  // [batch, kv_heads, blocks]
  uint8_t* finite;
  float* mean;  // [batch, kv_heads, blocks, d]
  float* key_norm;
  float* radius;
  float* low;
  float* high;
  uint8_t* planes;  // [bits, batch, kv_heads, kv_len, bytes]
  uint16_t* scale;  // [batch, kv_heads, kv_len] fp16
  uint16_t* error;
  uint16_t* metric_error;
  float* channel_scale;  // [batch, kv_heads, d]
  float* spectral;       // [batch, kv_heads, blocks]
  float* metric_spectral;
};

void build_geometry(const GeometryTask& task);

}  // namespace sieve
