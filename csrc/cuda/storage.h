// The types in which feature maps are stored.
#pragma once

namespace fr {

enum class Storage { kFloat32, kFloat16, kBFloat16 };

constexpr int storage_bytes(Storage s) { return s == Storage::kFloat32 ? 4 : 2; }

}  // namespace fr
