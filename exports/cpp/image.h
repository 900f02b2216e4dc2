// Images for polarmask.cc: read from binary PPM files, and resized as Pillow does it, and so lite.py.
#pragma once
#include <algorithm>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

using Error = std::runtime_error;

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error(path + ": " + std::strerror(errno));
  try {
    return {std::istreambuf_iterator<char>(file), {}};
  } catch (const std::system_error& error) {  // a directory opens like a file
    throw Error(path + ": " + error.code().message());
  }
}

struct Image {
  int width, height;
  std::vector<uint8_t> rgb;
};

// Binary PPM of 8 bits: "P6", width, height, 255, one space or newline, pixels. Comments run from # to the end of the line.
inline Image read_ppm(const std::string& path) {
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
inline Image resize_and_transpose(const Image& image, int width) {
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
