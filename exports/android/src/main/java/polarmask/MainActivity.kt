// A picture or what the camera sees -> LiteRT's CompiledModel on the GPU -> polygons on a canvas.
package polarmask

import android.Manifest
import android.content.Context
import android.graphics.Bitmap
import android.graphics.Canvas
import android.graphics.Color
import android.graphics.ImageDecoder
import android.graphics.Matrix
import android.graphics.Paint
import android.graphics.Path
import android.net.Uri
import android.os.Bundle
import android.view.View
import android.widget.Button
import android.widget.LinearLayout
import android.widget.TextView
import androidx.activity.ComponentActivity
import androidx.activity.result.contract.ActivityResultContracts
import androidx.camera.core.CameraSelector
import androidx.camera.core.ImageAnalysis
import androidx.camera.lifecycle.ProcessCameraProvider
import com.google.ai.edge.litert.Accelerator
import com.google.ai.edge.litert.CompiledModel
import com.google.ai.edge.litert.LiteRtException
import java.io.File
import java.util.concurrent.Executors

private const val MODEL = "model.tflite" // in src/main/assets; one of --raw runs on the GPU as a whole
private const val LONGEST = 2048 // pixels of a picture's longer side; larger ones are read in steps of 2, 3, ...

/** The model on the GPU, or on the CPU where the GPU does not take it: `where` says which. Of one thread. */
class Detector(context: Context) : AutoCloseable {
  private val file = File(context.filesDir, MODEL)
  val decoder: PolarMask
  private val model: CompiledModel
  val where: String

  init {
    context.assets.open(MODEL).use { asset -> file.outputStream().use { asset.copyTo(it) } }
    decoder = PolarMask(PolarMask.readMetadata(file))
    var reason: String? = if (decoder.isForCpuOnly) "its box branch" else null
    // A raw file is the GPU's alone: then LiteRT says so where it cannot. NMS of a whole file has to be left to the CPU.
    val accelerators = if (decoder.isRaw) arrayOf(Accelerator.GPU) else arrayOf(Accelerator.GPU, Accelerator.CPU)
    val options = CompiledModel.Options(*accelerators)
    // By default it is float16 where the GPU has that: faster, and further from what the CPU finds.
    options.gpuOptions = CompiledModel.GpuOptions(precision = CompiledModel.GpuOptions.Precision.FP32)
    model = try {
      CompiledModel.create(file.path, if (reason == null) options else CompiledModel.Options(Accelerator.CPU))
    } catch (error: LiteRtException) {
      reason = error.message ?: "no GPU"
      CompiledModel.create(file.path, CompiledModel.Options(Accelerator.CPU))
    }
    where = if (reason != null) "CPU ($reason)" else if (decoder.isRaw) "GPU" else "GPU, NMS on the CPU"
  }

  private val images = model.createInputBuffer("images")
  private val outputs = decoder.outputNames().associateWith { model.createOutputBuffer(it) }

  fun detect(bitmap: Bitmap): List<PolarMask.Detection> {
    val pixels = IntArray(bitmap.width * bitmap.height)
    bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
    val input = decoder.letterbox(pixels, bitmap.height, bitmap.width)
    images.writeInt8(input.pixels) // copies bytes, as they are, into the uint8 tensor
    model.run(mapOf("images" to images), outputs)
    val values = outputs.mapValues { (name, buffer) ->
      if (PolarMask.isInteger(name)) buffer.readInt().let { all -> FloatArray(all.size) { all[it].toFloat() } }
      else buffer.readFloat()
    }
    return decoder.detections(values, input).filter { it.score >= decoder.thresholds[it.label] }
  }

  override fun close() {
    images.close()
    outputs.values.forEach { it.close() }
    model.close()
  }
}

/** The picture, fitted into the view, and the outlines of what was found in it. */
class ResultView(context: Context) : View(context) {
  private var bitmap: Bitmap? = null
  private var found = emptyList<PolarMask.Detection>()
  private var labels = emptyArray<String>()
  private val line = Paint(Paint.ANTI_ALIAS_FLAG).apply { style = Paint.Style.STROKE; strokeWidth = 5f }
  private val fill = Paint().apply { style = Paint.Style.FILL }
  private val text = Paint(Paint.ANTI_ALIAS_FLAG).apply { textSize = 36f; color = Color.WHITE }

  fun show(bitmap: Bitmap, found: List<PolarMask.Detection>, labels: Array<String>) {
    this.bitmap = bitmap
    this.found = found
    this.labels = labels
    invalidate()
  }

  override fun onDraw(canvas: Canvas) {
    val shown = bitmap ?: return
    val scale = minOf(width.toFloat() / shown.width, height.toFloat() / shown.height)
    canvas.drawBitmap(shown, Matrix().apply { setScale(scale, scale) }, null)
    for (one in found.asReversed()) { // the best on top
      val path = Path()
      for (k in one.polygon.indices step 2) {
        val (x, y) = one.polygon[k] * scale to one.polygon[k + 1] * scale
        if (k == 0) path.moveTo(x, y) else path.lineTo(x, y)
      }
      path.close()
      val color = Color.HSVToColor(floatArrayOf(one.label * 137.5f % 360, 0.9f, 0.8f)) // neighbors far apart
      line.color = color
      fill.color = color and 0xffffff or 0x50000000
      canvas.drawPath(path, fill)
      canvas.drawPath(path, line)
      val title = "%s %.2f".format(labels[one.label], one.score)
      canvas.drawText(title, one.box[0] * scale, maxOf(one.box[1] * scale, text.textSize), text)
    }
  }
}

class MainActivity : ComponentActivity() {
  private val worker = Executors.newSingleThreadExecutor() // whose the detector is
  private var detector: Detector? = null
  private lateinit var view: ResultView
  private lateinit var status: TextView

  private val picture = registerForActivityResult(ActivityResultContracts.GetContent()) { uri ->
    if (uri != null) {
      stopCamera()
      worker.execute { attempt { show(read(uri)) } }
    }
  }
  private val permission = registerForActivityResult(ActivityResultContracts.RequestPermission()) { granted ->
    if (granted) startCamera() else status.text = "Without the permission there is no camera: choose a picture."
  }

  override fun onCreate(savedInstanceState: Bundle?) {
    super.onCreate(savedInstanceState)
    view = ResultView(this)
    status = TextView(this).apply { text = "Loading $MODEL" }
    val buttons = LinearLayout(this)
    buttons.addView(button("Picture") { picture.launch("image/*") })
    buttons.addView(button("Camera") { permission.launch(Manifest.permission.CAMERA) })
    val page = LinearLayout(this).apply { orientation = LinearLayout.VERTICAL; fitsSystemWindows = true }
    page.addView(buttons)
    page.addView(status)
    page.addView(view, LinearLayout.LayoutParams(LinearLayout.LayoutParams.MATCH_PARENT, 0, 1f))
    setContentView(page)
    worker.execute {
      attempt {
        val made = Detector(this)
        detector = made
        say("$MODEL runs on the ${made.where}")
      }
    }
  }

  override fun onDestroy() {
    super.onDestroy()
    worker.execute { detector?.close() }
    worker.shutdown()
  }

  private fun button(title: String, action: () -> Unit) =
    Button(this).apply { text = title; setOnClickListener { action() } }

  private fun startCamera() {
    val future = ProcessCameraProvider.getInstance(this)
    future.addListener({
      attempt {
        val frames = ImageAnalysis.Builder()
          .setOutputImageFormat(ImageAnalysis.OUTPUT_IMAGE_FORMAT_RGBA_8888)
          .setBackpressureStrategy(ImageAnalysis.STRATEGY_KEEP_ONLY_LATEST)
          .build()
        frames.setAnalyzer(worker) { frame ->
          val turn = Matrix().apply { postRotate(frame.imageInfo.rotationDegrees.toFloat()) }
          val bitmap = frame.use { it.toBitmap() }
          attempt { show(Bitmap.createBitmap(bitmap, 0, 0, bitmap.width, bitmap.height, turn, true)) }
        }
        future.get().unbindAll()
        future.get().bindToLifecycle(this, CameraSelector.DEFAULT_BACK_CAMERA, frames)
      }
    }, mainExecutor)
  }

  private fun stopCamera() {
    val future = ProcessCameraProvider.getInstance(this)
    future.addListener({ attempt { future.get().unbindAll() } }, mainExecutor)
  }

  /** Upright, as its EXIF data say, unlike lite.py. */
  private fun read(uri: Uri): Bitmap =
    ImageDecoder.decodeBitmap(ImageDecoder.createSource(contentResolver, uri)) { decoder, info, _ ->
      decoder.allocator = ImageDecoder.ALLOCATOR_SOFTWARE // whose pixels can be read
      decoder.setTargetSampleSize((maxOf(info.size.width, info.size.height) - 1) / LONGEST + 1)
    }

  private fun show(bitmap: Bitmap) {
    val detector = detector ?: return // of which `status` says why there is none
    val begin = System.nanoTime()
    val found = detector.detect(bitmap)
    val milliseconds = (System.nanoTime() - begin) / 1_000_000
    runOnUiThread { view.show(bitmap, found, detector.decoder.labels) }
    say("${found.size} found, $milliseconds ms from pixels to polygons on the ${detector.where}")
  }

  private fun say(text: String) = runOnUiThread { status.text = text }

  private fun attempt(action: () -> Unit) =
    try {
      action()
    } catch (error: Exception) {
      say("$error")
    }
}
