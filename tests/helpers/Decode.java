import java.io.File;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import polarmask.PolarMask;

/**
 * Runs exports/android's PolarMask.java for test_android.py: java Decode FOLDER. In the folder model.tflite, image (int32 height,
 * width, pixels) and NAME.f32, the network's outputs; written are input (bytes), scale and found, float32 a detection: class,
 * score, box, polygon. Numbers are little-endian. What fails is said in one line.
 */
final class Decode {
  public static void main(String[] arguments) throws Exception {
    try {
      Path folder = Path.of(arguments[0]);
      PolarMask decoder = new PolarMask(PolarMask.readMetadata(new File(arguments[0], "model.tflite")));
      ByteBuffer image = read(folder.resolve("image"));
      int height = image.getInt();
      int width = image.getInt();
      int[] pixels = new int[image.remaining() / 4];
      image.asIntBuffer().get(pixels);
      PolarMask.Input input = decoder.letterbox(pixels, height, width);
      Files.write(folder.resolve("input"), input.pixels);
      Map<String, float[]> outputs = new HashMap<>();
      for (String name : decoder.outputNames()) {
        Path file = folder.resolve(name + ".f32");
        if (Files.exists(file)) {
          ByteBuffer bytes = read(file);
          float[] values = new float[bytes.remaining() / 4];
          bytes.asFloatBuffer().get(values);
          outputs.put(name, values);
        }
      }
      List<PolarMask.Detection> found = decoder.detections(outputs, input);
      int numbers = found.isEmpty() ? 0 : 6 + found.get(0).polygon.length;
      ByteBuffer rows = ByteBuffer.allocate(4 * numbers * found.size()).order(ByteOrder.LITTLE_ENDIAN);
      for (PolarMask.Detection one : found) {
        rows.putFloat(one.label).putFloat(one.score);
        for (float value : one.box) {
          rows.putFloat(value);
        }
        for (float value : one.polygon) {
          rows.putFloat(value);
        }
      }
      Files.write(folder.resolve("found"), rows.array());
      System.out.println(String.join(",", decoder.labels) + " " + decoder.thresholds[0]);
    } catch (Exception error) {
      System.out.println("error: " + error.getMessage());
    }
  }

  private static ByteBuffer read(Path file) throws Exception {
    return ByteBuffer.wrap(Files.readAllBytes(file)).order(ByteOrder.LITTLE_ENDIAN);
  }
}
