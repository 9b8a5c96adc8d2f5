// What the simulator has to say: launches and reports, as lines of text for the tests.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "machine.h"

namespace fr::simt {
namespace {

constexpr size_t kMostReports = 50;

std::mutex mutex;
std::vector<std::string> launches, reports;

// Moves the lines out; valid until the next call for the same lines.
const char* take(std::vector<std::string>& lines, std::string& text) {
  const std::lock_guard<std::mutex> lock(mutex);
  text.clear();
  for (const std::string& line : lines) text += line + "\n";
  lines.clear();
  return text.c_str();
}

}  // namespace

std::string to_string(dim3 d) {
  return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
}

std::string to_string(const Place& place) {
  if (place.line == 0) return place.name ? place.name : "no collective";
  const std::string file = place.name;
  return "__syncthreads (" + file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line) +
         ")";
}

std::string kernel_name(const void* address, bool demangled) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_sname) return "unknown kernel";
  if (!demangled) return info.dli_sname;
  int status = 0;
  char* const name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string result = status == 0 ? name : info.dli_sname;
  std::free(name);
  return result;
}

std::string whereabouts() {
  const Launch& launch = *machine->launch;
  const uint3 &block = machine->geometry.block_index, &thread = current->index;
  return kernel_name(launch.kernel.address, true) + ", block (" +
         to_string({block.x, block.y, block.z}) + "), thread (" +
         to_string({thread.x, thread.y, thread.z}) + ")";
}

void report(const std::string& what) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (reports.size() < kMostReports) reports.push_back(what);
}

void record_launch(const Kernel& kernel, dim3 grid, dim3 block, size_t shared) {
  std::string line = kernel_name(kernel.address, true) + "\t" + kernel_name(kernel.address, false) +
                     "\t" + to_string(grid) + "\t" + to_string(block) + "\t" +
                     std::to_string(shared);
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back(std::move(line));
}

}  // namespace fr::simt

extern "C" {
#define FR_SIMT_API __attribute__((visibility("default")))

FR_SIMT_API void fr_simt_seed(uint32_t seed) { fr::simt::schedule_seed = seed; }

FR_SIMT_API const char* fr_simt_take_launches() {
  static std::string text;
  return fr::simt::take(fr::simt::launches, text);
}

FR_SIMT_API const char* fr_simt_take_reports() {
  static std::string text;
  return fr::simt::take(fr::simt::reports, text);
}
}
