// Polygons from the outputs of a --raw file, as lite.py assembles them.
#pragma once
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "metadata.h"

struct Detection {
  int label;
  float score;
  std::vector<float> box, polygon;  // xmin, ymin, xmax, ymax; x, y, x, y, ...
};

// A level of the head's outputs: [height, width, classes], [height, width, 1], [height, width, rays].
struct Level {
  int height, width, classes, rays;
  const float *class_logits, *centerness_logits, *ray_logits;
};

inline float sigmoid(float x) { return 1 / (1 + std::exp(-x)); }

// A --raw file's outputs, level by level as in raw.ray_units, to what the other files give: detections of descending scores,
// relative to the network's input of `height` x `width`. The best of each level, decoded, then NMS within each class.
inline std::vector<Detection> assemble(const std::vector<Level>& levels, const Raw& raw, int height, int width) {
  const float limit[] = {float(width), float(height)};
  const auto finite = [](float x) { return std::isfinite(x) ? x : throw Error("a number that is not finite"); };
  std::vector<Detection> found;
  for (size_t i = 0; i < levels.size(); ++i) {
    const Level& level = levels[i];
    const auto [number, unit] = raw.ray_units[i];
    struct Candidate { float score; int label, at; };
    std::vector<Candidate> best;
    for (int at = 0; at < level.height * level.width; ++at) {
      const float* logits = level.class_logits + size_t(at) * level.classes;
      const int highest = int(std::max_element(logits, logits + level.classes) - logits);
      const auto [first, last] = raw.multi_label ? std::pair(0, level.classes) : std::pair(highest, highest + 1);
      for (int label = first; label < last; ++label) {
        const float score = finite(sigmoid(logits[label]) * sigmoid(level.centerness_logits[at]));
        if (score > raw.score_threshold) best.push_back({score, label, at});
      }
    }
    std::stable_sort(best.begin(), best.end(), [](const Candidate& a, const Candidate& b) { return a.score > b.score; });
    if (best.size() > size_t(raw.candidates)) best.resize(raw.candidates);
    for (const Candidate& one : best) {
      const float stride = float(1 << number), x = one.at % level.width + 0.5f, y = one.at / level.width + 0.5f;
      const float center[] = {stride * x, stride * y};
      Detection detection{one.label, one.score, {limit[0], limit[1], 0, 0}, {}};
      for (int k = 0; k < level.rays; ++k) {
        const float logit = finite(level.ray_logits[size_t(one.at) * level.rays + k]);
        const float reach = unit * std::exp(std::clamp(logit, -raw.ray_limit, raw.ray_limit));
        const double angle = 2 * 3.14159265358979323846 * k / level.rays;
        for (const int axis : {0, 1}) {
          const float way = float(axis ? std::sin(angle) : std::cos(angle));
          const float place = std::clamp(center[axis] + reach * way, 0.f, limit[axis]);
          detection.polygon.push_back(place);
          detection.box[axis] = std::min(detection.box[axis], place);
          detection.box[axis + 2] = std::max(detection.box[axis + 2], place);
        }
      }
      found.push_back(std::move(detection));
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const Detection& a, const Detection& b) { return a.score > b.score; });
  std::vector<Detection> kept;
  std::vector<std::vector<float>> boxes;  // of those, moved where no two classes overlap
  const auto area = [](const std::vector<float>& box) { return (box[2] - box[0]) * (box[3] - box[1]); };
  for (Detection& one : found) {
    if (kept.size() == size_t(raw.max_detections)) break;
    std::vector<float> box = one.box;
    for (float& side : box) side += one.label * (std::max(limit[0], limit[1]) + 1);
    const auto overlaps = [&](const std::vector<float>& other) {
      const auto side = [&](int i) { return std::max(std::min(box[i + 2], other[i + 2]) - std::max(box[i], other[i]), 0.f); };
      const float common = side(0) * side(1);
      return common > raw.nms_iou * (area(other) + area(box) - common);
    };
    if (std::any_of(boxes.begin(), boxes.end(), overlaps)) continue;
    boxes.push_back(box);
    kept.push_back(std::move(one));
  }
  for (Detection& one : kept) {
    if (raw.temperature != 1 || raw.score_bias != 0) {  // of calibrated scores
      const float score = std::clamp(one.score, 1e-6f, 1 - 1e-6f);
      one.score = sigmoid((std::log(score) - std::log(1 - score)) / raw.temperature + raw.score_bias);
    }
    for (int i = 0; i < 4; ++i) one.box[i] /= limit[i % 2];
    for (size_t i = 0; i < one.polygon.size(); ++i) one.polygon[i] /= limit[i % 2];
  }
  return kept;
}
