package polarmask;

import java.io.DataInputStream;
import java.io.File;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Iterator;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.zip.ZipEntry;
import java.util.zip.ZipFile;
import org.json.JSONArray;
import org.json.JSONException;
import org.json.JSONObject;

/**
 * What lite.py does around the network of an exported .tflite file, step by step and in its float32: metadata, letterbox,
 * assemble (of --raw files), unpack. No class of Android's but org.json, so that it runs on any JVM.
 *
 * <p>Coordinates are continuous, x right, y down; pixel (0, 0) covers [0, 1) x [0, 1).
 */
public final class PolarMask {
  private static final float SHOWN = 0.3f; // least score of what is shown, of a model that does not say it
  private static final int MOST_METADATA = 1 << 20; // bytes

  /** An object, in pixels of the image: box xmin, ymin, xmax, ymax, polygon x, y, x, y, ... */
  public static final class Detection {
    public final int label; // labels[label] is its name
    public final float score;
    public final float[] box;
    public final float[] polygon;

    Detection(int label, float score, float[] box, float[] polygon) {
      this.label = label;
      this.score = score;
      this.box = box;
      this.polygon = polygon;
    }
  }

  /** An image as the network takes it: uint8 RGB [height, width, 3], of scaleX x scaleY pixels of the image a pixel. */
  public static final class Input {
    public final byte[] pixels;
    public final float scaleX;
    public final float scaleY;
    public final int imageHeight;
    public final int imageWidth;

    Input(byte[] pixels, float scaleX, float scaleY, int imageHeight, int imageWidth) {
      this.pixels = pixels;
      this.scaleX = scaleX;
      this.scaleY = scaleY;
      this.imageHeight = imageHeight;
      this.imageWidth = imageWidth;
    }
  }

  public final String[] labels;
  public final float[] thresholds; // of each class: the score from which a detection is worth showing
  public final int height; // of the network's input
  public final int width;
  public final boolean isRaw;
  public final boolean isForCpuOnly; // LiteRT's GPU would give other polygons
  private final boolean stretch;
  private final int rays;
  private final float[] ways; // in which the rays point: x, y, x, y, ...
  private final JSONObject raw;
  private final float votingIou; // 0: no votes
  private final TreeMap<Integer, Float> rayUnits = new TreeMap<>(); // by level

  /** Of the text of metadata.json. Throws JSONException where something is missing. */
  public PolarMask(String metadata) throws JSONException {
    JSONObject described = new JSONObject(metadata);
    JSONObject input = described.getJSONObject("input");
    JSONArray classes = described.getJSONArray("classes");
    height = input.getInt("height");
    width = input.getInt("width");
    rays = described.getInt("rays");
    ways = new float[2 * Math.max(0, rays)];
    for (int k = 0; k < rays; k++) {
      ways[2 * k] = (float) Math.cos(2 * Math.PI * k / rays);
      ways[2 * k + 1] = (float) Math.sin(2 * Math.PI * k / rays);
    }
    labels = new String[classes.length()];
    thresholds = new float[classes.length()];
    JSONObject found = described.optJSONObject("thresholds"); // by `polarmask evaluate`
    for (int i = 0; i < labels.length; i++) {
      labels[i] = classes.getJSONObject(i).getString("name");
      thresholds[i] = found == null ? SHOWN : (float) found.getJSONArray("classes").getDouble(i);
    }
    String resize = input.optString("resize", "letterbox");
    stretch = resize.equals("stretch");
    if (height < 1 || width < 1 || rays < 1 || labels.length < 1 || !stretch && !resize.equals("letterbox")) {
      throw new JSONException("metadata.json is not of a .tflite file that `polarmask export` writes");
    }
    raw = described.optJSONObject("raw");
    isRaw = raw != null;
    votingIou = isRaw && raw.has("voting_iou") ? (float) raw.getDouble("voting_iou") : 0;
    if (!(votingIou >= 0 && votingIou <= 1) || isRaw && raw.getInt("candidates") < 1) {
      throw new JSONException("raw in metadata.json: voting_iou is not of 0 to 1, or candidates less than 1");
    }
    isForCpuOnly = described.optBoolean("cpu_only");
    if (isRaw) {
      JSONObject units = raw.getJSONObject("ray_units");
      for (Iterator<?> levels = units.keys(); levels.hasNext(); ) {
        String level = (String) levels.next();
        rayUnits.put(Integer.valueOf(level), (float) units.getDouble(level));
      }
    }
  }

  /** The text of metadata.json in the zip at the end of a .tflite file. */
  public static String readMetadata(File model) throws IOException {
    try (ZipFile archive = new ZipFile(model)) {
      ZipEntry entry = archive.getEntry("metadata.json");
      if (entry == null || entry.getSize() < 0 || entry.getSize() > MOST_METADATA) {
        throw new IOException("no metadata.json of at most 1 MB at its end");
      }
      byte[] text = new byte[(int) entry.getSize()];
      try (DataInputStream stream = new DataInputStream(archive.getInputStream(entry))) {
        stream.readFully(text);
      }
      return new String(text, StandardCharsets.UTF_8);
    }
  }

  /** The names of the network's outputs. */
  public List<String> outputNames() {
    List<String> names = new ArrayList<>();
    if (!isRaw) {
      names.addAll(Arrays.asList("num_detections", "detection_scores", "detection_classes", "detection_boxes",
          "detection_polygons"));
    }
    for (int level : rayUnits.keySet()) {
      names.addAll(Arrays.asList("P" + level + "_classes", "P" + level + "_centerness", "P" + level + "_rays"));
    }
    return names;
  }

  /** Whether an output is of 32-bit integers; all others are of floats. */
  public static boolean isInteger(String output) {
    return output.equals("num_detections") || output.equals("detection_classes");
  }

  /** An image of 0xAARRGGBB pixels, row by row, fitted into the network's input: resized, top left in zeros. */
  public Input letterbox(int[] image, int imageHeight, int imageWidth) {
    if (imageHeight < 1 || imageWidth < 1 || image.length < (long) imageHeight * imageWidth) {
      throw new IllegalArgumentException(image.length + " pixels are no image of " + imageWidth + " x " + imageHeight);
    }
    double scale = Math.min((double) height / imageHeight, (double) width / imageWidth);
    int filledHeight = stretch ? height : Math.max(1, (int) Math.rint(imageHeight * scale));
    int filledWidth = stretch ? width : Math.max(1, (int) Math.rint(imageWidth * scale));
    int row = filledWidth * 3;
    byte[] rows = new byte[imageHeight * row]; // the columns made, the rows still as they were
    int[][] columns = weights(imageWidth, filledWidth);
    for (int y = 0, to = 0; y < imageHeight; y++) {
      for (int[] column : columns) {
        for (int shift = 16; shift >= 0; shift -= 8) {
          int sum = 1 << 21;
          for (int k = 1; k < column.length; k++) {
            sum += column[k] * (image[y * imageWidth + column[0] + k - 1] >> shift & 255);
          }
          rows[to++] = (byte) (sum >> 22);
        }
      }
    }
    byte[] pixels = new byte[height * width * 3];
    int[][] lines = weights(imageHeight, filledHeight);
    for (int y = 0; y < filledHeight; y++) {
      int[] line = lines[y];
      for (int x = 0; x < row; x++) {
        int sum = 1 << 21;
        for (int k = 1; k < line.length; k++) {
          sum += line[k] * (rows[(line[0] + k - 1) * row + x] & 255);
        }
        pixels[y * width * 3 + x] = (byte) (sum >> 22);
      }
    }
    return new Input(pixels, (float) imageWidth / filledWidth, (float) imageHeight / filledHeight, imageHeight, imageWidth);
  }

  /** For every one of `size` pixels, the first of `from` pixels it is made of, then their weights times 2^22: Pillow's. */
  private static int[][] weights(int from, int size) {
    double scale = (double) from / size;
    double support = Math.max(scale, 1);
    int[][] all = new int[size][];
    for (int pixel = 0; pixel < size; pixel++) {
      double center = (pixel + 0.5) * scale;
      int first = (int) Math.max(center - support + 0.5, 0);
      int last = (int) Math.min(center + support + 0.5, from);
      double[] triangle = new double[last - first];
      double sum = 0;
      for (int k = 0; k < triangle.length; k++) {
        triangle[k] = Math.max(1 - Math.abs((k + first - center + 0.5) / support), 0);
        sum += triangle[k];
      }
      all[pixel] = new int[1 + triangle.length];
      all[pixel][0] = first;
      for (int k = 0; k < triangle.length; k++) {
        all[pixel][k + 1] = (int) (0.5 + triangle[k] / sum * (1 << 22));
      }
    }
    return all;
  }

  /** The network's outputs by name to detections, best first. Throws IllegalArgumentException where one has another size. */
  public List<Detection> detections(Map<String, float[]> outputs, Input input) throws JSONException {
    List<Detection> found = isRaw ? assemble(outputs) : whole(outputs);
    List<Detection> placed = new ArrayList<>();
    for (Detection one : found) {
      placed.add(new Detection(one.label, one.score, place(one.box, input), place(one.polygon, input)));
    }
    return placed;
  }

  /** x, y, ... in [0, 1] of the network's input to pixels of the image, clipped to it. */
  private float[] place(float[] points, Input input) {
    float[] placed = new float[points.length];
    for (int i = 0; i < points.length; i += 2) {
      placed[i] = clip(points[i] * (width * input.scaleX), input.imageWidth);
      placed[i + 1] = clip(points[i + 1] * (height * input.scaleY), input.imageHeight);
    }
    return placed;
  }

  private List<Detection> whole(Map<String, float[]> outputs) {
    int count = (int) output(outputs, "num_detections", 1)[0];
    float[] scores = outputs.get("detection_scores");
    int most = scores == null ? 0 : scores.length;
    float[] classes = output(outputs, "detection_classes", most);
    float[] boxes = output(outputs, "detection_boxes", most * 4);
    float[] polygons = output(outputs, "detection_polygons", most * rays * 2);
    if (count < 0 || count > most) {
      throw new IllegalArgumentException("more detections than there may be");
    }
    List<Detection> found = new ArrayList<>();
    for (int i = 0; i < count; i++) {
      float[] box = {boxes[4 * i + 1], boxes[4 * i], boxes[4 * i + 3], boxes[4 * i + 2]};
      found.add(new Detection((int) classes[i], scores[i], box,
          Arrays.copyOfRange(polygons, i * rays * 2, (i + 1) * rays * 2)));
    }
    return found;
  }

  /** What may become a detection, or have a vote on one's polygon: rays from a point, in pixels of the network's input. */
  private static final class Candidate {
    final int label;
    final float score;
    final float x;
    final float y;
    final float[] rays;
    final float[] polygon; // cut at the border, as its box is
    final float[] box;
    final float[] apart; // the box moved where those of no other class are

    Candidate(int label, float score, float x, float y, float[] rays, float[] polygon, float[] box, float[] apart) {
      this.label = label;
      this.score = score;
      this.x = x;
      this.y = y;
      this.rays = rays;
      this.polygon = polygon;
      this.box = box;
      this.apart = apart;
    }
  }

  private Candidate candidate(int label, float score, float x, float y, float[] lengths) {
    float[] polygon = new float[rays * 2];
    float[] box = {width, height, 0, 0};
    for (int k = 0; k < rays; k++) {
      polygon[2 * k] = clip(x + lengths[k] * ways[2 * k], width);
      polygon[2 * k + 1] = clip(y + lengths[k] * ways[2 * k + 1], height);
      box[0] = Math.min(box[0], polygon[2 * k]);
      box[1] = Math.min(box[1], polygon[2 * k + 1]);
      box[2] = Math.max(box[2], polygon[2 * k]);
      box[3] = Math.max(box[3], polygon[2 * k + 1]);
    }
    float away = (float) (label * (Math.max(height, width) + 1.0)); // not "of the same class": numbers round as in lite.py
    float[] apart = {box[0] + away, box[1] + away, box[2] + away, box[3] + away};
    return new Candidate(label, score, x, y, lengths, polygon, box, apart);
  }

  /** From a --raw file's outputs, the head's logits by level: postprocess.detect, as lite.assemble does it. */
  private List<Detection> assemble(Map<String, float[]> outputs) throws JSONException {
    float least = (float) raw.getDouble("score_threshold");
    float iou = (float) raw.getDouble("nms_iou");
    List<Candidate> candidates = new ArrayList<>();
    for (Map.Entry<Integer, Float> level : rayUnits.entrySet()) {
      addCandidates(candidates, outputs, level.getKey(), level.getValue());
    }
    candidates.sort((a, b) -> Float.compare(b.score, a.score));
    List<Candidate> kept = new ArrayList<>();
    for (Candidate one : candidates) {
      if (kept.size() < raw.getInt("max_detections") && one.score > least && !overlapsBetter(one, kept, iou)) {
        kept.add(one);
      }
    }
    List<Detection> found = new ArrayList<>();
    for (Candidate one : kept) {
      Candidate voted = votingIou > 0 ? vote(one, candidates) : one;
      found.add(new Detection(one.label, calibrated(one.score), relative(voted.box), relative(voted.polygon)));
    }
    return found;
  }

  /** The best of a level: of equal scores the first. */
  private void addCandidates(List<Candidate> candidates, Map<String, float[]> outputs, int level, float unit)
      throws JSONException {
    boolean pairs = raw.getBoolean("multi_label");
    float logitLimit = (float) raw.getDouble("ray_limit");
    float least = votingIou > 0 ? -1 : (float) raw.getDouble("score_threshold"); // all may vote
    int stride = 1 << level;
    int columns = (width + stride - 1) / stride;
    int locations = columns * ((height + stride - 1) / stride);
    int count = labels.length;
    float[] classes = output(outputs, "P" + level + "_classes", locations * count);
    float[] centerness = output(outputs, "P" + level + "_centerness", locations);
    float[] logits = output(outputs, "P" + level + "_rays", locations * rays);
    float[] scores = new float[locations * count]; // NaN is none
    for (int at = 0; at < locations; at++) {
      int largest = at * count;
      for (int i = largest; i < (at + 1) * count; i++) {
        largest = classes[i] > classes[largest] ? i : largest;
      }
      for (int i = at * count; i < (at + 1) * count; i++) {
        float score = pairs || i == largest ? 1 / (1 + exp(-classes[i])) / (1 + exp(-centerness[at])) : -1;
        scores[i] = score > least ? score : -1;
      }
    }
    float[] sorted = scores.clone();
    Arrays.sort(sorted);
    float last = Math.max(sorted[Math.max(0, sorted.length - raw.getInt("candidates"))], 0);
    List<Integer> best = new ArrayList<>();
    for (int i = 0; i < scores.length; i++) {
      if (scores[i] >= last) {
        best.add(i);
      }
    }
    best.sort((a, b) -> Float.compare(scores[b], scores[a]));
    for (int i : best.subList(0, Math.min(best.size(), raw.getInt("candidates")))) {
      int at = i / count;
      float[] lengths = new float[rays];
      for (int k = 0; k < rays; k++) {
        lengths[k] = unit * exp(Math.min(Math.max(logits[at * rays + k], -logitLimit), logitLimit));
      }
      candidates.add(
          candidate(i % count, scores[i], stride * (at % columns + 0.5f), stride * (at / columns + 0.5f), lengths));
    }
  }

  private boolean overlapsBetter(Candidate one, List<Candidate> better, float iou) {
    for (Candidate other : better) {
      float common = common(one.apart, other.apart);
      if (common > iou * (area(other.apart) + area(one.apart) - common)) {
        return true;
      }
    }
    return false;
  }

  /** With rays averaged by score with those of the four best of all, best first, whose boxes overlap its own. */
  private Candidate vote(Candidate one, List<Candidate> all) {
    float least = votingIou / (1 + votingIou);
    List<Candidate> voters = new ArrayList<>();
    float sum = 0;
    for (int i = 0; i < all.size() && voters.size() < 4; i++) {
      Candidate other = all.get(i);
      if (common(one.apart, other.apart) > (area(other.apart) + area(one.apart)) * least) {
        voters.add(other);
        sum += other.score;
      }
    }
    float[] lengths = new float[rays];
    float rest = 1;
    for (Candidate voter : voters) {
      float weight = voter.score / Math.max(sum, 1e-12f);
      rest -= weight;
      for (int k = 0; k < rays; k++) {
        lengths[k] += weight * lengthIn(voter, one, k);
      }
    }
    for (int k = 0; k < rays; k++) {
      lengths[k] += one.rays[k] * rest;
    }
    return candidate(one.label, one.score, one.x, one.y, lengths);
  }

  /**
   * How far ray k of `one` reaches in the polygon of `other`: Newton's method. Where it meets the line of that side of the
   * other polygon which its end lies towards; where it meets none ahead, the last length stays.
   */
  private float lengthIn(Candidate other, Candidate one, int k) {
    float shiftX = one.x - other.x;
    float shiftY = one.y - other.y;
    float wayX = ways[2 * k];
    float wayY = ways[2 * k + 1];
    float length = one.rays[k];
    for (int step = 0; step < 2; step++) {
      float angle = (float) Math.atan2(shiftY + length * wayY, shiftX + length * wayX);
      int first = Math.floorMod((int) Math.floor(angle * (float) (rays / (2 * Math.PI))), rays);
      int second = (first + 1) % rays;
      float startX = other.rays[first] * ways[2 * first];
      float startY = other.rays[first] * ways[2 * first + 1];
      float alongX = other.rays[second] * ways[2 * second] - startX;
      float alongY = other.rays[second] * ways[2 * second + 1] - startY;
      float across = wayX * alongY - wayY * alongX;
      float meets = ((startX - shiftX) * alongY - (startY - shiftY) * alongX) / (Math.abs(across) > 1e-6f ? across : 1e-6f);
      length = meets > length / 2 && meets < 2 * length ? meets : length;
    }
    return length;
  }

  private static float area(float[] box) {
    return (box[2] - box[0]) * (box[3] - box[1]);
  }

  private static float common(float[] a, float[] b) {
    float wide = Math.max(Math.min(a[2], b[2]) - Math.max(a[0], b[0]), 0);
    return wide * Math.max(Math.min(a[3], b[3]) - Math.max(a[1], b[1]), 0);
  }

  private float calibrated(float score) {
    float temperature = (float) raw.optDouble("temperature", 1);
    float bias = (float) raw.optDouble("score_bias", 0);
    if (temperature == 1 && bias == 0) {
      return score;
    }
    float inside = Math.min(Math.max(score, 1e-6f), 1 - 1e-6f);
    float odds = (float) Math.log(1 - inside) - (float) Math.log(inside);
    return 1 / (1 + exp(odds / temperature - bias));
  }

  private float[] relative(float[] points) {
    float[] divided = new float[points.length];
    for (int i = 0; i < points.length; i++) {
      divided[i] = points[i] / (i % 2 == 0 ? width : height);
    }
    return divided;
  }

  private static float exp(float x) {
    return (float) Math.exp(x);
  }

  private static float clip(float value, float limit) {
    return Math.min(Math.max(value, 0), limit);
  }

  private static float[] output(Map<String, float[]> outputs, String name, int size) {
    float[] values = outputs.get(name);
    if (values == null || values.length != size) {
      String what = values == null ? "is missing" : "has " + values.length + " numbers";
      throw new IllegalArgumentException("output " + name + " " + what + ", expected " + size);
    }
    return values;
  }
}
