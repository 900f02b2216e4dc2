plugins {
  id("com.android.application") version "8.13.2"
  id("org.jetbrains.kotlin.android") version "2.3.20"
}

android {
  namespace = "polarmask"
  compileSdk = 36
  defaultConfig {
    applicationId = "polarmask.sample"
    minSdk = 28 // ImageDecoder; LiteRT itself needs 24
    targetSdk = 36
    versionCode = 1
    versionName = "1"
    ndk { abiFilters += "arm64-v8a" }
  }
  compileOptions {
    sourceCompatibility = JavaVersion.VERSION_11
    targetCompatibility = JavaVersion.VERSION_11
  }
  androidResources { noCompress += "tflite" }
}

kotlin { compilerOptions { jvmTarget = org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_11 } }

dependencies {
  implementation("com.google.ai.edge.litert:litert:2.3.0")
  implementation("com.google.ai.edge.litert:litert-gpu:2.3.0") // since 2.3 an artifact of its own
  implementation("androidx.activity:activity-ktx:1.10.1")
  implementation("androidx.camera:camera-camera2:1.4.2")
  implementation("androidx.camera:camera-lifecycle:1.4.2")
}
