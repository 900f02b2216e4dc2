// An exported PolarMask .tflite file and a PPM image in, a line a detection out: LiteRT's C API from C++17.
// README.md says how to build and use it. To read it, begin at `class PolarMask`.
#include <dlfcn.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

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
enum LiteRtElementType : int { kFloat32 = 1, kInt32 = 2, kUInt8 = 3 };
struct LiteRtRankedTensorType {
  LiteRtElementType element_type;
  unsigned rank : 7;
  bool has_strides : 1;
  int32_t dimensions[8];
  uint32_t strides[8];
};
constexpr int kCpu = 1;  // of the accelerators
struct LiteRtEnvOption {
  int tag;  // 24: accelerators to look for; 25: from which severity on to log, where 4 is never
  struct { int type; int64_t value; } any;  // 2: an integer
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
LiteRtStatus LiteRtRunCompiledModel(LiteRtCompiledModel, size_t, size_t, LiteRtTensorBuffer*, size_t, LiteRtTensorBuffer*);
void LiteRtDestroyEnvironment(LiteRtEnvironment);
void LiteRtDestroyModel(LiteRtModel);
void LiteRtDestroyOptions(LiteRtOptions);
void LiteRtDestroyCompiledModel(LiteRtCompiledModel);
void LiteRtDestroyTensorBuffer(LiteRtTensorBuffer);
}

using Error = std::runtime_error;

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
const Error other_tensors("its tensors are not those of exports/README.md (--raw files are for lite.py alone)");

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

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(path + ": " + std::strerror(errno));
  return {std::istreambuf_iterator<char>(file), {}};
}

// metadata.json, which export put behind the model as the one member of a zip archive, not compressed.
std::string read_metadata(const std::string& file) {
  const auto number = [&](size_t at, int bytes) {
    size_t value = 0;
    while (bytes--) value = value << 8 | static_cast<unsigned char>(file.at(at + bytes));
    return value;
  };
  try {
    const size_t tail = file.size() - 22, entry = number(tail + 16, 4), local = number(entry + 42, 4);
    const size_t begin = local + 30 + number(local + 26, 2) + number(local + 28, 2), size = number(entry + 24, 4);
    const bool stored = !file.compare(tail, 4, "PK\5\6") && number(entry + 10, 2) == 0 && begin + size <= entry;
    if (stored && !file.compare(entry + 46, 13, "metadata.json")) return file.substr(begin, size);
  } catch (const std::out_of_range&) {
  }
  throw Error("no metadata.json at its end: cut off, or not made by polarmask export");
}

struct Image {
  int width, height;
  std::vector<uint8_t> rgb;
};

// Binary PPM of 8 bits: "P6", width, height, 255, one space or newline, pixels. Comments run from # to the end of the line.
Image read_ppm(const std::string& path) {
  const std::string file = read_file(path);
  if (file.compare(0, 2, "P6")) throw Error(path + ": not a binary PPM image, which begins with P6");
  const char *at = file.data() + 2, *end = file.data() + file.size();
  unsigned numbers[3];
  for (unsigned& number : numbers) {
    for (; at < end && (std::isspace(static_cast<unsigned char>(*at)) || *at == '#'); ++at) {
      if (*at == '#') at = std::find(at, end - 1, '\n');
    }
    const auto [rest, problem] = std::from_chars(at, end, number);
    if (problem != std::errc()) throw Error(path + ": no width, height and maximum in its header");
    at = rest;
  }
  const auto [width, height, maximum] = numbers;
  if (!width || !height) throw Error(path + ": an image without pixels");
  if (maximum != 255) throw Error(path + ": save it with 8 bits a channel (a maximum of 255)");
  if (at == end || size_t(end - ++at) / 3 / width < height) throw Error(path + ": cut off");
  return {int(width), int(height), std::vector<uint8_t>(at, at + size_t(3) * width * height)};
}

// The image with its width resized, turned over its diagonal: done twice, both sides are resized. Bilinear as in Pillow, and
// so in lite.py: when shrinking the filter widens with the factor, weights have 22 bits, each pass rounds to 8.
Image resize_and_transpose(const Image& image, int width) {
  Image result{image.height, width, std::vector<uint8_t>(size_t(3) * image.height * width)};
  const double scale = double(image.width) / width, reach = std::max(scale, 1.0);
  for (int x = 0; x < width; ++x) {
    const double center = (x + 0.5) * scale;
    const int first = std::max(int(center - reach + 0.5), 0), last = std::min(int(center + reach + 0.5), image.width);
    std::vector<double> shares;
    double total = 0;
    for (int i = first; i < last; ++i) {
      shares.push_back(std::max(1 - std::abs((i - center + 0.5) * (1 / reach)), 0.0));
      total += shares.back();
    }
    std::vector<int> weights;
    for (const double share : shares) weights.push_back(int(share / total * (1 << 22) + 0.5));
    for (int y = 0; y < image.height; ++y) {
      for (int c = 0; c < 3; ++c) {
        int64_t sum = 1 << 21;
        const uint8_t* pixel = &image.rgb[3 * (size_t(y) * image.width + first) + c];
        for (size_t i = 0; i < weights.size(); ++i) sum += int64_t(weights[i]) * pixel[3 * i];
        result.rgb[3 * (size_t(x) * image.height + y) + c] = uint8_t(std::min<int64_t>(sum >> 22, 255));
      }
    }
  }
  return result;
}

struct Detection {
  int label;
  float score;
  std::vector<float> box, polygon;  // xmin, ymin, xmax, ymax; x, y, x, y, ...: in pixels of the image, clipped to it
};

class PolarMask {
 public:
  std::vector<std::string> labels;

  PolarMask(const std::string& path, int threads) : file_(read_file(path)) {
    try {
      load(threads);
      bind_tensors();
    } catch (const std::exception& error) {
      throw Error(path + ": " + error.what());
    }
  }

  // Every detection, of descending scores.
  std::vector<Detection> operator()(const Image& image) {
    const int height = input_.type.dimensions[1], width = input_.type.dimensions[2];
    const double scale = std::min(double(height) / image.height, double(width) / image.width);
    const int wide = stretch_ ? width : std::max(1, int(std::nearbyint(image.width * scale)));
    const int high = stretch_ ? height : std::max(1, int(std::nearbyint(image.height * scale)));
    const Image fitted = resize_and_transpose(resize_and_transpose(image, wide), high);
    std::fill_n(input_.data<uint8_t>(), size_t(3) * height * width, 0);  // right of it and below it are zeros
    for (size_t y = 0; y < size_t(high); ++y) {
      std::copy_n(&fitted.rgb[3 * y * wide], 3 * wide, input_.data<uint8_t>() + 3 * y * width);
    }
    check(LiteRtRunCompiledModel(compiled_.handle, 0, 1, &input_.buffer.handle, kOutputs, buffers_), "run the model");

    const float limit[] = {float(image.width), float(image.height)};
    const float unit[] = {float(width * (double(image.width) / wide)), float(height * (double(image.height) / high))};
    const auto pixels = [&](float value, int axis) { return std::clamp(value * unit[axis], 0.f, limit[axis]); };
    const int rows = outputs_[kScores].type.dimensions[1], rays = outputs_[kPolygons].type.dimensions[2];
    std::vector<Detection> found;
    for (int row = 0; row < std::min(*outputs_[kCount].data<int32_t>(), rows); ++row) {
      const float *box = outputs_[kBoxes].data<float>() + 4 * row, *point = outputs_[kPolygons].data<float>() + 2 * rays * row;
      Detection one{outputs_[kClasses].data<int32_t>()[row], outputs_[kScores].data<float>()[row], {}, {}};
      for (const int i : {1, 0, 3, 2}) one.box.push_back(pixels(box[i], 1 - i % 2));  // y comes first in the output
      for (int i = 0; i < 2 * rays; ++i) one.polygon.push_back(pixels(point[i], i % 2));
      found.push_back(one);
    }
    return found;
  }

 private:
  enum { kCount, kScores, kClasses, kBoxes, kPolygons, kOutputs };

  void load(int threads) {
    if (file_.size() < 8 || file_.compare(4, 4, "TFL3")) throw Error("not a .tflite file");
    const std::string metadata = read_metadata(file_);
    stretch_ = metadata.find("\"resize\": \"stretch\"") != std::string::npos;
    for (size_t at = 0, end; (at = metadata.find("\"name\": \"", at)) != std::string::npos; at = end) {
      for (end = at += 9; end < metadata.size() && metadata[end] != '"';) end += metadata[end] == '\\' ? 2 : 1;
      labels.push_back(metadata.substr(at, end - at));
    }
    if (!dlsym(RTLD_DEFAULT, "LiteRtGetCompiledModelEnvironment")) throw Error("libLiteRt.so is older than 2.2: take 2.3");

    const LiteRtEnvOption cpu_only_and_quiet[] = {{24, {2, kCpu}}, {25, {2, 4}}};
    check(LiteRtCreateEnvironment(2, cpu_only_and_quiet, &environment_.handle), "start");
    check(LiteRtCreateModelFromBuffer(environment_.handle, file_.data(), file_.size(), &model_.handle), "read the model");
    Owned<LiteRtOptions, LiteRtDestroyOptions> options;
    check(LiteRtCreateOptions(&options.handle), "make options");
    check(LiteRtSetOptionsHardwareAccelerators(options.handle, kCpu), "choose the CPU");
    LiteRtOpaqueOptions cpu;
    char* toml = strdup(("num_threads = " + std::to_string(threads) + "\n").c_str());
    check(LiteRtCreateOpaqueOptions("xnnpack", toml, std::free, &cpu), "make options of the CPU");
    check(LiteRtAddOpaqueOptions(options.handle, cpu), "set options of the CPU");
    check(LiteRtCreateCompiledModel(environment_.handle, model_.handle, options.handle, &compiled_.handle), "prepare it");
  }

  void bind_tensors() {
    const struct { std::string name; LiteRtElementType type; std::vector<int> shape; } known[] = {
        {"num_detections", kInt32, {1}}, {"detection_scores", kFloat32, {1, kAny}}, {"detection_classes", kInt32, {1, kAny}},
        {"detection_boxes", kFloat32, {1, kAny, 4}}, {"detection_polygons", kFloat32, {1, kAny, kAny, 2}}};
    LiteRtSignature signature;
    LiteRtTensor tensor;
    size_t inputs, outputs;
    check(LiteRtGetModelSignature(model_.handle, 0, &signature), "find a signature");
    check(LiteRtGetNumSignatureInputs(signature, &inputs), "count inputs");
    check(LiteRtGetNumSignatureOutputs(signature, &outputs), "count outputs");
    if (inputs != 1 || outputs != kOutputs) throw other_tensors;
    check(LiteRtGetSignatureInputTensorByIndex(signature, 0, &tensor), "find the input");
    input_.bind(tensor, kUInt8, {1, kAny, kAny, 3});
    for (size_t i = 0; i < outputs; ++i) {  // in the file's order, which need not be ours
      const char* name;
      check(LiteRtGetSignatureOutputName(signature, i, &name), "name an output");
      check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), "find an output");
      const auto which = std::find_if(known, std::end(known), [&](const auto& one) { return one.name == name; }) - known;
      if (which == kOutputs || outputs_[which].buffer.handle) throw other_tensors;
      outputs_[which].bind(tensor, known[which].type, known[which].shape);
      buffers_[i] = outputs_[which].buffer.handle;
    }
    for (const int i : {kClasses, kBoxes, kPolygons}) {
      if (outputs_[i].type.dimensions[1] != outputs_[kScores].type.dimensions[1]) throw other_tensors;
    }
  }

  const std::string file_;  // LiteRT reads the model in place
  bool stretch_;
  Owned<LiteRtEnvironment, LiteRtDestroyEnvironment> environment_;
  Owned<LiteRtModel, LiteRtDestroyModel> model_;
  Owned<LiteRtCompiledModel, LiteRtDestroyCompiledModel> compiled_;
  Tensor input_, outputs_[kOutputs];
  LiteRtTensorBuffer buffers_[kOutputs];
};

int main(int argc, char** argv) try {
  double score = 0.3, threads = 1, digits = 1;
  bool good = argc >= 3 && argc % 2;
  for (int i = 3; good && i < argc; i += 2) {
    const std::string option = argv[i], value = argv[i + 1];
    double& set = option == "--score" ? score : option == "--threads" ? threads : digits;
    const auto [rest, problem] = std::from_chars(value.data(), value.data() + value.size(), set);
    good = (&set != &digits || option == "--digits") && problem == std::errc() && !*rest;
  }
  if (!good || !(threads >= 1 && threads <= 64 && digits >= 0 && digits <= 9)) {
    throw Error("usage: polarmask MODEL.tflite IMAGE.ppm [--score 0.3] [--threads 1 (to 64)] [--digits 1 (0 to 9)]");
  }
  PolarMask model(argv[1], int(threads));
  for (const Detection& one : model(read_ppm(argv[2]))) {
    if (!(one.score >= score)) continue;
    const auto print = [&](char before, float value, int more) { std::printf("%c%.*f", before, int(digits) + more, value); };
    const bool named = one.label >= 0 && size_t(one.label) < model.labels.size();
    std::printf("%s", named ? model.labels[one.label].c_str() : std::to_string(one.label).c_str());
    print(' ', one.score, 2);
    std::printf(" box");
    for (const float side : one.box) print(' ', side, 0);
    std::printf(" polygon");
    for (size_t i = 0; i < one.polygon.size(); ++i) print(i % 2 ? ',' : ' ', one.polygon[i], 0);
    std::printf("\n");
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
