// A frozen network in C++, without Python:
//
// python network.py
// g++ -std=c++20 -O1 serve.cpp $(python network.py --flags) -o serve
// ./serve network.pt2
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <exception>

constexpr int64_t kSize = 64;  // as in network.py

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: serve network.pt2\n");
    return 2;
  }
  try {
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader network(argv[1]);
    for (const int64_t batch : {1, 3}) {
      const at::Tensor images = at::ones({batch, 3, kSize, kSize});
      const at::Tensor logits = network.run({images})[0];
      std::printf("batch %ld: class %ld, %.4f\n", static_cast<long>(batch),
                  static_cast<long>(logits[0].argmax().item<int64_t>()),
                  logits[0].max().item<float>());
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
