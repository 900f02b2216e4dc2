"""Train, save and use PolarMask as any Keras model. Run it with an empty directory: python docs/examples/keras_fit.py DIR"""

import sys
from pathlib import Path

import tf_keras

import polarmask_tf as pm

folder = Path(sys.argv[1])
epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 20

# COCO annotations and images, here drawn ones, to TFRecord shards.
pm.draw_shapes(folder / "shapes", train=200, val=20, progress=False)
for split in ("train", "val"):
    pm.convert_coco(folder / "shapes" / split / "annotations.json", folder / "shapes" / split / "images", folder / split)

config = pm.load_config("shapes", ["data.batch=8", f"train.steps={25 * epochs}"])
train, val = pm.training_data(folder / "train", config), pm.validation_data(folder / "val", config)

model = pm.PolarMask(config, classes=["circle", "rectangle", "triangle", "star"])
model.summary()
model.compile(optimizer=pm.make_optimizer(config), steps_per_execution=5)
model.fit(
    train,
    validation_data=val,
    epochs=epochs,
    callbacks=[tf_keras.callbacks.ModelCheckpoint(str(folder / "best.keras"), save_best_only=True)],
)

model = pm.load_model(folder / "best.keras")
print(model.evaluate(val, return_dict=True))

predictor = pm.load_predictor(model)
result = predictor(folder / "shapes" / "val" / "images" / "000000.png")
print(result)
result.save(folder / "result.png")
