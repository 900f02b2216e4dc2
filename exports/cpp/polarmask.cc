// An exported PolarMask .tflite file and a PPM image in, a line a detection out: LiteRT's C API from C++17.
// README.md says how to build and use it. To read it, begin at `class PolarMask`.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "assemble.h"
#include "image.h"
#include "metadata.h"

// What is used here of LiteRT 2.3's C API: its wheel has the library but no headers. A status of 0 is success.
extern "C" {
using LiteRtStatus = int;
using LiteRtEnvironment = struct LiteRtEnvironmentT*;
using LiteRtModel = struct LiteRtModelT*;
using LiteRtSignature = struct LiteRtSignatureT*;
using LiteRtTensor = struct LiteRtTensorT*;
using LiteRtOptions = struct LiteRtOptionsT*;
using LiteRtOpaqueOptions = struct LiteRtOpaqueOptionsT*;
using LiteRtCompiledModel = struct LiteRtCompiledModelT*;
using LiteRtTensorBuffer = struct LiteRtTensorBufferT*;
using LiteRtTensorBufferRequirements = struct LiteRtTensorBufferRequirementsT*;
enum LiteRtElementType : int { kFloat32 = 1, kInt32 = 2, kUInt8 = 3 };
struct LiteRtRankedTensorType {
  LiteRtElementType element_type;
  unsigned rank : 7;
  bool has_strides : 1;
  int32_t dimensions[8];
  uint32_t strides[8];
};
constexpr int kCpu = 1, kGpu = 2;  // of the accelerators
constexpr int kHostMemory = 1;     // of the types of buffers
struct LiteRtEnvOption {
  int tag;  // 22: folder of its libraries; 24: accelerators to look for; 25: from which severity on to log, where 4 is never
  struct { int type; int64_t value; } any;  // 2: an integer; 8: a pointer to text
};
LiteRtStatus LiteRtCreateEnvironment(int, const LiteRtEnvOption*, LiteRtEnvironment*);
LiteRtStatus LiteRtCreateModelFromBuffer(LiteRtEnvironment, const void*, size_t, LiteRtModel*);
LiteRtStatus LiteRtGetModelSignature(LiteRtModel, size_t, LiteRtSignature*);
LiteRtStatus LiteRtGetNumSignatureInputs(LiteRtSignature, size_t*);
LiteRtStatus LiteRtGetNumSignatureOutputs(LiteRtSignature, size_t*);
LiteRtStatus LiteRtGetSignatureOutputName(LiteRtSignature, size_t, const char**);
LiteRtStatus LiteRtGetSignatureInputTensorByIndex(LiteRtSignature, size_t, LiteRtTensor*);
LiteRtStatus LiteRtGetSignatureOutputTensorByIndex(LiteRtSignature, size_t, LiteRtTensor*);
LiteRtStatus LiteRtGetRankedTensorType(LiteRtTensor, LiteRtRankedTensorType*);
LiteRtStatus LiteRtCreateOptions(LiteRtOptions*);
LiteRtStatus LiteRtSetOptionsHardwareAccelerators(LiteRtOptions, int);
LiteRtStatus LiteRtCreateOpaqueOptions(const char*, void*, void (*)(void*), LiteRtOpaqueOptions*);
LiteRtStatus LiteRtAddOpaqueOptions(LiteRtOptions, LiteRtOpaqueOptions);
LiteRtStatus LiteRtCreateCompiledModel(LiteRtEnvironment, LiteRtModel, LiteRtOptions, LiteRtCompiledModel*);
LiteRtStatus LiteRtCreateTensorBufferFromHostMemory(
    const LiteRtRankedTensorType*, void*, size_t, void (*)(void*), LiteRtTensorBuffer*);
LiteRtStatus LiteRtGetCompiledModelInputBufferRequirements(
    LiteRtCompiledModel, size_t, size_t, LiteRtTensorBufferRequirements*);
LiteRtStatus LiteRtGetTensorBufferRequirementsSupportedTensorBufferType(LiteRtTensorBufferRequirements, int, int*);
LiteRtStatus LiteRtRunCompiledModel(LiteRtCompiledModel, size_t, size_t, LiteRtTensorBuffer*, size_t, LiteRtTensorBuffer*);
void LiteRtDestroyEnvironment(LiteRtEnvironment);
void LiteRtDestroyModel(LiteRtModel);
void LiteRtDestroyOptions(LiteRtOptions);
void LiteRtDestroyCompiledModel(LiteRtCompiledModel);
void LiteRtDestroyTensorBuffer(LiteRtTensorBuffer);
}

void check(LiteRtStatus status, const char* what) {
  if (status) throw Error("LiteRT could not " + std::string(what) + " (its status " + std::to_string(status) + ")");
}

template <class T, void (*destroy)(T)>
struct Owned {
  T handle = nullptr;
  Owned() = default;
  Owned(const Owned&) = delete;
  ~Owned() { if (handle) destroy(handle); }
};

constexpr int kAny = -1;  // in shapes: a size that only the model knows
const Error other_tensors("its tensors are not those of exports/README.md");

// A tensor of the model in memory of ours, of which LiteRT wants 64 bytes' alignment.
struct Tensor {
  struct alignas(64) Block { uint8_t bytes[64]; };
  LiteRtRankedTensorType type;
  std::vector<Block> memory;
  Owned<LiteRtTensorBuffer, LiteRtDestroyTensorBuffer> buffer;

  template <class T>
  T* data() { return reinterpret_cast<T*>(memory.data()); }

  void bind(LiteRtTensor tensor, LiteRtElementType element, const std::vector<int>& shape) {
    check(LiteRtGetRankedTensorType(tensor, &type), "tell a tensor's shape");
    const auto fits = [](int side, int has) { return side == has || (side == kAny && has > 0 && has <= 1 << 14); };
    const bool good = type.element_type == element && type.rank == shape.size();
    if (!good || !std::equal(shape.begin(), shape.end(), type.dimensions, fits)) throw other_tensors;
    size_t bytes = element == kUInt8 ? 1 : 4;
    for (size_t i = 0; i < shape.size(); ++i) bytes *= type.dimensions[i];
    memory.resize(bytes / sizeof(Block) + 3);  // kernels may read some bytes past the end
    bytes = memory.size() * sizeof(Block);
    check(LiteRtCreateTensorBufferFromHostMemory(&type, memory.data(), bytes, nullptr, &buffer.handle), "take memory");
  }
};

class PolarMask {
 public:
  Metadata metadata;
  std::string runs_on;  // which part of it runs where

  // accelerator: "cpu", or "gpu" and, for what that does not take, the CPU.
  PolarMask(const std::string& path, int threads, const std::string& accelerator) : file_(read_file(path)) {
    try {
      if (file_.size() < 8 || file_.compare(4, 4, "TFL3")) throw Error("not a .tflite file");
      metadata = read_metadata(file_);
      if (metadata.cpu_only && accelerator == "gpu") {
        throw Error("on a GPU its box branch gives other polygons; run it without --accelerator gpu");
      }
      load(threads, accelerator == "gpu");
      bind_tensors();
    } catch (const std::exception& error) {
      throw Error(path + ": " + error.what());
    }
  }

  // Every detection, of descending scores, in pixels of the image, clipped to it.
  std::vector<Detection> operator()(const Image& image) {
    const int height = input_.type.dimensions[1], width = input_.type.dimensions[2];
    const double scale = std::min(double(height) / image.height, double(width) / image.width);
    const int wide = metadata.stretch ? width : std::max(1, int(std::nearbyint(image.width * scale)));
    const int high = metadata.stretch ? height : std::max(1, int(std::nearbyint(image.height * scale)));
    const Image fitted = resize_and_transpose(resize_and_transpose(image, wide), high);
    std::fill_n(input_.data<uint8_t>(), size_t(3) * height * width, 0);  // right of it and below it are zeros
    for (size_t y = 0; y < size_t(high); ++y) {
      std::copy_n(&fitted.rgb[3 * y * wide], 3 * wide, input_.data<uint8_t>() + 3 * y * width);
    }
    const size_t count = buffers_.size();
    check(LiteRtRunCompiledModel(compiled_.handle, 0, 1, &input_.buffer.handle, count, buffers_.data()), "run the model");

    std::vector<Detection> found = metadata.is_raw ? assemble(levels(), metadata.raw, height, width) : unpack();
    const float limit[] = {float(image.width), float(image.height)};
    const float unit[] = {float(width * (double(image.width) / wide)), float(height * (double(image.height) / high))};
    for (Detection& one : found) {
      for (auto* numbers : {&one.box, &one.polygon}) {
        int axis = 0;
        for (float& value : *numbers) {
          value = std::clamp(value * unit[axis], 0.f, limit[axis]);
          axis = 1 - axis;
        }
      }
    }
    return found;
  }

 private:
  void load(int threads, bool on_gpu) {
    void* create = dlsym(RTLD_DEFAULT, "LiteRtCreateEnvironment");
    Dl_info library;
    if (!dlsym(RTLD_DEFAULT, "LiteRtGetCompiledModelEnvironment")) throw Error("libLiteRt.so is older than 2.2: take 2.3");
    if (!create || !dladdr(create, &library)) throw Error("libLiteRt.so cannot be found");
    std::string folder = library.dli_fname;  // in which libLiteRtWebGpuAccelerator.so or the like is looked for
    folder.erase(folder.find_last_of('/') + 1);

    const int where = on_gpu ? kCpu | kGpu : kCpu;
    const LiteRtEnvOption quiet[] = {{24, {2, where}}, {25, {2, 4}}, {22, {8, reinterpret_cast<int64_t>(folder.c_str())}}};
    check(LiteRtCreateEnvironment(on_gpu ? 3 : 2, quiet, &environment_.handle), "start");
    check(LiteRtCreateModelFromBuffer(environment_.handle, file_.data(), file_.size(), &model_.handle), "read the model");
    Owned<LiteRtOptions, LiteRtDestroyOptions> options;
    check(LiteRtCreateOptions(&options.handle), "make options");
    check(LiteRtSetOptionsHardwareAccelerators(options.handle, where), "choose accelerators");
    add_options(options.handle, "xnnpack", "num_threads = " + std::to_string(threads) + "\n");
    // In float32: left to itself a GPU may compute in halves, to which far corners and classes apart for NMS are lost.
    if (on_gpu) add_options(options.handle, "gpu_options", "precision = 2\n");
    const auto status = LiteRtCreateCompiledModel(environment_.handle, model_.handle, options.handle, &compiled_.handle);
    if (!on_gpu) check(status, "prepare it");
    runs_on = on_gpu ? "network on the GPU: " + gpu_share(status) : "network on the CPU";
    if (metadata.is_raw) runs_on += "; polygons on the CPU (assemble.h)";
  }

  static void add_options(LiteRtOptions options, const char* of, const std::string& toml) {
    LiteRtOpaqueOptions made;
    check(LiteRtCreateOpaqueOptions(of, strdup(toml.c_str()), std::free, &made), "make options");
    check(LiteRtAddOpaqueOptions(options, made), "set options");
  }

  // What the API tells of it: from whose memory the input is taken, and whether everything runs there.
  std::string gpu_share(LiteRtStatus status) {
    LiteRtTensorBufferRequirements input;
    int memory = kHostMemory;
    bool all = false;
    if (!status) {
      check(LiteRtGetCompiledModelInputBufferRequirements(compiled_.handle, 0, 0, &input), "tell where it runs");
      check(LiteRtGetTensorBufferRequirementsSupportedTensorBufferType(input, 0, &memory), "tell where it runs");
    }
    if (memory == kHostMemory) throw Error("LiteRT finds no GPU that it can use; run it without --accelerator gpu");
    void* known = dlsym(RTLD_DEFAULT, "LiteRtCompiledModelIsNonCpuFullyAccelerated");
    if (!known) return "how much of it LiteRT 2.2 does not tell";
    const auto is_all_there = reinterpret_cast<LiteRtStatus (*)(LiteRtCompiledModel, bool*)>(known);
    check(is_all_there(compiled_.handle, &all), "tell where it runs");
    return all ? "every operation" : "not every operation, the others on the CPU";
  }

  void bind_tensors() {
    struct Known { LiteRtElementType type; std::vector<int> shape; };
    std::map<std::string, Known> known = {
        {"num_detections", {kInt32, {1}}}, {"detection_scores", {kFloat32, {1, kAny}}},
        {"detection_classes", {kInt32, {1, kAny}}}, {"detection_boxes", {kFloat32, {1, kAny, 4}}},
        {"detection_polygons", {kFloat32, {1, kAny, kAny, 2}}}};
    if (metadata.is_raw) known.clear();
    for (const auto& [level, unit] : metadata.raw.ray_units) {
      const std::string name = "P" + std::to_string(level) + "_";
      known[name + "centerness"] = {kFloat32, {1, kAny, kAny, 1}};
      known[name + "classes"] = known[name + "rays"] = {kFloat32, {1, kAny, kAny, kAny}};
    }
    LiteRtSignature signature;
    LiteRtTensor tensor;
    size_t inputs, outputs;
    check(LiteRtGetModelSignature(model_.handle, 0, &signature), "find a signature");
    check(LiteRtGetNumSignatureInputs(signature, &inputs), "count inputs");
    check(LiteRtGetNumSignatureOutputs(signature, &outputs), "count outputs");
    if (inputs != 1 || outputs != known.size()) throw other_tensors;
    check(LiteRtGetSignatureInputTensorByIndex(signature, 0, &tensor), "find the input");
    input_.bind(tensor, kUInt8, {1, kAny, kAny, 3});
    for (size_t i = 0; i < outputs; ++i) {  // in the file's order, which need not be ours
      const char* name;
      check(LiteRtGetSignatureOutputName(signature, i, &name), "name an output");
      check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), "find an output");
      const auto one = known.find(name);
      if (one == known.end() || outputs_[name].buffer.handle) throw other_tensors;
      outputs_[name].bind(tensor, one->second.type, one->second.shape);
      buffers_.push_back(outputs_[name].buffer.handle);
    }
    if (metadata.is_raw) {
      for (const Level& level : levels()) {
        if (level.classes != levels()[0].classes || level.rays != levels()[0].rays) throw other_tensors;
      }
      return;
    }
    for (const char* name : {"detection_classes", "detection_boxes", "detection_polygons"}) {
      if (outputs_[name].type.dimensions[1] != outputs_["detection_scores"].type.dimensions[1]) throw other_tensors;
    }
  }

  // A --raw file's outputs.
  std::vector<Level> levels() {
    std::vector<Level> all;
    for (const auto& [number, unit] : metadata.raw.ray_units) {
      const std::string name = "P" + std::to_string(number) + "_";
      Tensor *tensors[] = {&outputs_[name + "classes"], &outputs_[name + "centerness"], &outputs_[name + "rays"]};
      const auto& [classes, centerness, rays] = tensors;
      const int* shape = classes->type.dimensions;
      for (const Tensor* other : tensors) {
        if (!std::equal(shape, shape + 3, other->type.dimensions)) throw other_tensors;
      }
      const int count = rays->type.dimensions[3];
      all.push_back(
          {shape[1], shape[2], shape[3], count, classes->data<float>(), centerness->data<float>(), rays->data<float>()});
    }
    return all;
  }

  // The other files' outputs.
  std::vector<Detection> unpack() {
    Tensor &scores = outputs_["detection_scores"], &polygons = outputs_["detection_polygons"];
    const int rows = scores.type.dimensions[1], numbers = 2 * polygons.type.dimensions[2];
    std::vector<Detection> found;
    for (int row = 0; row < std::min(*outputs_["num_detections"].data<int32_t>(), rows); ++row) {
      const float *box = outputs_["detection_boxes"].data<float>() + 4 * row, *points = polygons.data<float>() + numbers * row;
      const int label = outputs_["detection_classes"].data<int32_t>()[row];
      const std::vector<float> sides = {box[1], box[0], box[3], box[2]};  // y comes first in the output
      found.push_back({label, scores.data<float>()[row], sides, {points, points + numbers}});
    }
    return found;
  }

  const std::string file_;  // LiteRT reads the model in place
  Owned<LiteRtEnvironment, LiteRtDestroyEnvironment> environment_;
  Owned<LiteRtModel, LiteRtDestroyModel> model_;
  Owned<LiteRtCompiledModel, LiteRtDestroyCompiledModel> compiled_;
  Tensor input_;
  std::map<std::string, Tensor> outputs_;
  std::vector<LiteRtTensorBuffer> buffers_;  // of the outputs, in the file's order
};

int main(int argc, char** argv) try {
  double score = -1, threads = 1, digits = 1;
  std::string accelerator;
  bool good = argc >= 3 && argc % 2;
  for (int i = 3; good && i < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    if (option == "--accelerator") {
      accelerator = value;
      good = value == "cpu" || value == "gpu";
      continue;
    }
    double& set = option == "--score" ? score : option == "--threads" ? threads : digits;
    const auto [rest, problem] = std::from_chars(value.data(), value.data() + value.size(), set);
    good = (&set != &digits || option == "--digits") && problem == std::errc() && !*rest && set >= 0;
  }
  if (!good || !(score <= 1.5 && threads >= 1 && threads <= 64 && digits >= 0 && digits <= 9)) {
    throw Error("usage: polarmask MODEL.tflite IMAGE.ppm [--score X (0 to 1.5; default: the model's own, or 0.3)]"
                " [--threads 1 (to 64)] [--digits 1 (0 to 9)] [--accelerator cpu|gpu]");
  }
  const int output = dup(1);
  dup2(2, 1);  // LiteRT's GPU accelerator writes to stdout
  PolarMask model(argv[1], int(threads), accelerator);
  std::fflush(stdout);
  output < 0 ? close(1) : dup2(output, 1);
  if (!accelerator.empty()) std::fprintf(stderr, "%s\n", model.runs_on.c_str());
  const std::vector<std::string>& labels = model.metadata.labels;
  const std::vector<float>& shown_scores = model.metadata.shown_scores;
  for (const Detection& one : model(read_ppm(argv[2]))) {
    const bool named = one.label >= 0 && size_t(one.label) < labels.size();
    if (!(one.score >= (score >= 0 ? float(score) : named ? shown_scores[one.label] : 0.3f))) continue;
    const auto print = [&](char before, float value, int more) { std::printf("%c%.*f", before, int(digits) + more, value); };
    std::printf("%s", named ? labels[one.label].c_str() : std::to_string(one.label).c_str());
    print(' ', one.score, 2);
    std::printf(" box");
    for (const float side : one.box) print(' ', side, 0);
    std::printf(" polygon");
    for (size_t i = 0; i < one.polygon.size(); ++i) print(i % 2 ? ',' : ' ', one.polygon[i], 0);
    std::printf("\n");
  }
  if (std::fflush(stdout) || std::ferror(stdout)) {
    throw Error(std::string("the output cannot be written: ") + std::strerror(errno));
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
