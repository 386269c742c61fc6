// What kernels know of a step; written by src/cuda/step.rs, whose structs these are. And what one step takes from the sampling
// before it.
#pragma once
#include "platform.cuh"

struct Counts {
  u32 rows;       // of the step
  u32 sequences;
  u32 segments;   // 0 when no row has an adapter
  u32 unused;
};

struct Sequence {
  u32 row;     // first row
  u32 rows;
  u32 table;   // first entry in the block tables
  u32 blocks;  // entries there
};

struct Segment {
  u32 row;  // first row
  u32 rows;
  u64 adapter;  // address of its sites; 0 for the base model alone
};

// A row whose token the host does not know yet: it is the token of a row of the sampling before.
struct Drawn {
  u32 row;
  u32 sample;
};

// Written by sample.cu for each row.
struct SampleResult {
  u32 token;
  float logprob;
  u32 top;  // alternatives there are
  u32 unused;
};

struct Step {
  const Counts* counts;
  const u32* tokens;        // [rows]
  const u32* positions;     // [rows]
  const u32* row_sequence;  // [rows]: the number of each row's sequence
  const Sequence* sequences;
  const u32* block_tables;  // page numbers
  const Segment* segments;
};
