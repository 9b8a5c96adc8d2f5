// Barriers, a warp's collectives and asynchronous copies.
#include <immintrin.h>

#include <cstring>

#include "machine.h"

namespace fr::simt {

void fail(const char* what) { machine->fail(what); }

void barrier(const char* file, int line) {
  Machine& m = *machine;
  Barrier& b = m.barrier;
  const Place here{file, line};
  if (b.arrived == 0) {
    b.where = here;
  } else if (b.where.line != line || std::strcmp(b.where.name, file) != 0) {
    m.fail("threads of a block wait at different barriers: " + to_string(b.where) + " and " +
           to_string(here));
  }
  if (++b.arrived < m.live) {
    m.wait(&b.generation, here);
  } else {
    b.arrived = 0;
    ++b.generation;
  }
}

namespace {

constexpr uint32_t kAll = 0xffffffffu;

Collective& collective_of(Warp& warp, uint32_t mask) {
  if (mask == kAll) return warp.whole;
  for (auto& c : warp.collectives) {
    if (c->mask == mask) return *c;
  }
  warp.collectives.push_back(std::make_unique<Collective>());
  warp.collectives.back()->mask = mask;
  return *warp.collectives.back();
}

struct NoWork {
  void operator()(Collective::Data&) const {}
};

// The lanes of `mask` meet: each calls give(data, lane), the last to come calls last(data). What it
// returns can be read until the caller's next collective.
template <class Give, class Last = NoWork>
const Collective::Data& meet(uint32_t mask, const char* name, Give give, Last last = {}) {
  Machine& m = *machine;
  Thread& self = m.thread();
  if (!(mask >> self.lane & 1)) m.fail(std::string(name) + ": the lane is not in its own mask");
  Collective& c = collective_of(m.warps[self.warp], mask);
  if (c.arrived == 0) {
    c.name = name;
  } else if (c.name != name && std::strcmp(c.name, name) != 0) {
    m.fail(std::string("lanes of a warp diverge: some wait at ") + c.name + ", this one comes to " +
           name);
  }
  Collective::Data& data = c.data[c.generation & 1];
  give(data, self.lane);
  if (++c.arrived < __builtin_popcount(mask)) {
    m.wait(&c.generation, {name, 0});
  } else {
    last(data);
    c.arrived = 0;
    ++c.generation;
  }
  return data;
}

}  // namespace

void sync_warp(uint32_t mask) {
  meet(
      mask, "__syncwarp", [](Collective::Data&, int) {},
      [mask](Collective::Data&) {
        if (race_sync_warp) race_sync_warp(mask);
      });
}

uint64_t shuffle(uint32_t mask, uint64_t value, int source, const char* name) {
  if (!(mask >> source & 1)) {
    machine->fail(std::string(name) + ": lane " + std::to_string(source) +
                  ", which is to give the value, is not in the mask");
  }
  const auto& data =
      meet(mask, name, [value](Collective::Data& d, int lane) { d.values[lane] = value; });
  return data.values[source];
}

// Row r of matrix i comes from lane 8 i + r. Lane t gets elements 2 (t mod 4) and the next one of
// row t / 4 of each matrix.
void load_matrices(uint32_t (&r)[4], const MatrixRow& row) {
  const auto& data =
      meet(kAll, "ldmatrix", [&row](Collective::Data& d, int lane) { d.rows[lane] = row; });
  const int lane = machine->thread().lane;
  for (int i = 0; i < 4; ++i) {
    const auto* const from = reinterpret_cast<const unsigned char*>(&data.rows[8 * i + lane / 4]);
    std::memcpy(&r[i], from + lane % 4 * 4, 4);
  }
}

namespace {

// Fragments as the PTX manual gives them for m16n8k16 and m16n8k8; g and t are its groupID and
// threadID_in_group.
using Fragments = Collective::Fragments;

struct Registers {
  const uint32_t (&a)[4];
  uint32_t b[2];
  const float (&d)[4];
};

void give_halves(Fragments& f, unsigned lane, const Registers& r) {
  const unsigned g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&f.a16[g + i % 2 * 8][2 * t + i / 2 * 8], &r.a[i], 4);
  for (int i = 0; i < 2; ++i) {
    f.b16[2 * t + 8 * i][g] = static_cast<uint16_t>(r.b[i]);
    f.b16[2 * t + 8 * i + 1][g] = static_cast<uint16_t>(r.b[i] >> 16);
  }
}

void give_words(Fragments& f, unsigned lane, const Registers& r) {
  const unsigned g = lane / 4, t = lane % 4;
  const auto tf32 = [](float& to, uint32_t bits) {
    bits &= ~0x1fffu;  // the tensor core does not see the rest
    std::memcpy(&to, &bits, 4);
  };
  for (int i = 0; i < 4; ++i) tf32(f.a32[g + i % 2 * 8][t + i / 2 * 4], r.a[i]);
  for (int i = 0; i < 2; ++i) tf32(f.b32[t + 4 * i][g], r.b[i]);
}

void give_sums(Fragments& f, unsigned lane, const float (&d)[4]) {
  for (int i = 0; i < 2; ++i) std::memcpy(&f.c[lane / 4 + 8 * i][lane % 4 * 2], &d[2 * i], 8);
}

void take_sums(const Fragments& f, unsigned lane, float (&d)[4]) {
  for (int i = 0; i < 2; ++i) std::memcpy(&d[2 * i], &f.c[lane / 4 + 8 * i][lane % 4 * 2], 8);
}

template <Operands kOperands>
__m256 eight_floats(const uint16_t* from) {
  const __m128i bits = _mm_load_si128(reinterpret_cast<const __m128i*>(from));
  if constexpr (kOperands == Operands::kFloat16) return _mm256_cvtph_ps(bits);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// c += a b. The products are summed apart and then added, as tensor cores do.
template <int kDepth>
void multiply_rows(Fragments& f, const float (*a)[kDepth], const __m256 (&b)[kDepth]) {
  for (int m = 0; m < 16; ++m) {
    __m256 sum = _mm256_setzero_ps();
    for (int k = 0; k < kDepth; ++k) sum = _mm256_fmadd_ps(_mm256_set1_ps(a[m][k]), b[k], sum);
    _mm256_store_ps(f.c[m], _mm256_add_ps(sum, _mm256_load_ps(f.c[m])));
  }
}

template <Operands kOperands>
void multiply_halves(Fragments& f) {
  alignas(32) float a[16][16];
  __m256 b[16];
  for (int m = 0; m < 16; ++m) {
    _mm256_store_ps(a[m], eight_floats<kOperands>(f.a16[m]));
    _mm256_store_ps(a[m] + 8, eight_floats<kOperands>(f.a16[m] + 8));
  }
  for (int k = 0; k < 16; ++k) b[k] = eight_floats<kOperands>(f.b16[k]);
  multiply_rows<16>(f, a, b);
}

void multiply_words(Fragments& f) {
  __m256 b[8];
  for (int k = 0; k < 8; ++k) b[k] = _mm256_load_ps(f.b32[k]);
  multiply_rows<8>(f, f.a32, b);
}

template <class Give>
void multiply_with(const char* name, float (&d)[4], Give give, void (*product)(Fragments&)) {
  const auto& data = meet(
      kAll, name,
      [&](Collective::Data& to, unsigned lane) {
        give(to.fragments, lane);
        give_sums(to.fragments, lane, d);
      },
      [product](Collective::Data& of) { product(of.fragments); });
  take_sums(data.fragments, machine->thread().lane, d);
}

}  // namespace

void multiply(Operands operands, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Registers r{a, {b0, b1}, d};
  const auto halves = [&r](Fragments& f, unsigned lane) { give_halves(f, lane, r); };
  const auto words = [&r](Fragments& f, unsigned lane) { give_words(f, lane, r); };
  switch (operands) {
    case Operands::kFloat16:
      return multiply_with("mma.f16", d, halves, &multiply_halves<Operands::kFloat16>);
    case Operands::kBFloat16:
      return multiply_with("mma.bf16", d, halves, &multiply_halves<Operands::kBFloat16>);
    case Operands::kTf32:
      return multiply_with("mma.tf32", d, words, &multiply_words);
  }
}

// From here until the copy is waited for, no one may touch the 16 bytes: they are NaN, poisoned
// under ASan, and known to the race checker. The data are read as late as the hardware may.
void copy_async(void* shared, const void* global, bool valid) {
  Thread& self = machine->thread();
  unsigned char* const to = static_cast<unsigned char*>(shared);
  if (race_begin_copy) race_begin_copy(to, __builtin_return_address(0));
  if (to < machine->shared ||
      to >= machine->shared + kMostSharedBytes + kMostBuffers * 2 * kGapBytes) {
    machine->fail("cp_async_16: the copy's end is not in shared memory");
  }
  std::memset(to, 0xff, 16);
  if (__asan_poison_memory_region) __asan_poison_memory_region(to, 16);
  self.copies.push_back({to, static_cast<const unsigned char*>(global), valid, self.copy_group});
}

void commit_copies() { ++machine->thread().copy_group; }

void wait_copies(int pending) {
  Thread& self = machine->thread();
  size_t left = 0;
  for (const Copy& copy : self.copies) {
    if (copy.group + static_cast<uint32_t>(pending) >= self.copy_group) {
      self.copies[left++] = copy;
      continue;
    }
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(copy.to, 16);
    if (copy.valid) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
    if (race_end_copy) race_end_copy(copy.to, __builtin_return_address(0));
  }
  self.copies.resize(left);
}

}  // namespace fr::simt
