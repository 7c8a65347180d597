"""The factory model: a small anchor-free convolutional detector with outputs as YOLOX has them.

Input [B, 240, 320, 3] RGB, 0..255 as it comes: the first batch normalisation takes care of the
scale, so that nothing has to be computed before an integer model. Two levels (strides 8 and 16);
the finer one also sees the coarser one, since a hole is only missing where a part is.
"""

import numpy as np
import tensorflow as tf
from tensorflow import keras

from scripts.factory.data import CELLS, HEIGHT, WIDTH

layers = keras.layers


def conv(x: tf.Tensor, channels: int, size: int = 3, stride: int = 1) -> tf.Tensor:
    x = layers.Conv2D(channels, size, stride, "same", use_bias=False)(x)
    return layers.ReLU()(layers.BatchNormalization(momentum=0.97)(x))


def around(x: tf.Tensor) -> tf.Tensor:
    """The same with what lies around it, up to the size of a part, for few weights."""
    wide = layers.DepthwiseConv2D(5, padding="same", use_bias=False)(x)
    wide = layers.BatchNormalization(momentum=0.97)(wide)
    return layers.Add()([x, conv(wide, x.shape[-1], 1)])


def head(x: tf.Tensor, classes: int) -> list[tf.Tensor]:
    """Box, objectness and classes of each cell, [B, cells, 4 | 1 | classes], before sigmoid."""
    rare = keras.initializers.Constant(-4.0)
    parts = [
        layers.Conv2D(4, 1)(x),
        layers.Conv2D(1, 1, bias_initializer=rare)(x),
        layers.Conv2D(classes, 1)(x),
    ]
    return [layers.Reshape((-1, part.shape[-1]))(part) for part in parts]


def build(classes: int) -> keras.Model:
    """[B, 240, 320, 3] -> reg [B, N, 4], obj [B, N, 1], cls [B, N, classes] (logits)."""
    picture = keras.Input((HEIGHT, WIDTH, 3), name="image")
    x = conv(picture, 12, stride=2)
    x = conv(x, 20, stride=2)
    x = conv(x, 20)
    x = conv(x, 32, stride=2)
    fine = conv(conv(x, 32), 32)
    x = conv(fine, 42, stride=2)
    coarse = around(conv(x, 42))
    x = layers.UpSampling2D()(conv(coarse, 32, 1))
    x = conv(conv(layers.Add()([x, fine]), 32), 32)
    levels = [head(x, classes), head(conv(coarse, 32, 1), classes)]
    outputs = [layers.Concatenate(axis=1)(list(both)) for both in zip(*levels, strict=True)]
    return keras.Model(picture, outputs)


def with_scores(model: keras.Model) -> keras.Model:
    """The model as it is shipped: objectness and classes after sigmoid."""
    reg, obj, cls = model.outputs
    name = layers.Activation
    return keras.Model(
        model.input,
        [
            name("linear", name="reg")(reg),
            name("sigmoid", name="obj")(obj),
            name("sigmoid", name="cls")(cls),
        ],
    )


def corners(reg: tf.Tensor) -> tf.Tensor:
    """YOLOX's boxes, xy = (o + grid) * stride and wh = exp(o) * stride, as x1, y1, x2, y2."""
    grid, stride = tf.constant(CELLS[:, :2]), tf.constant(CELLS[:, 2:])
    middle = (reg[..., :2] + grid) * stride
    half = tf.exp(tf.clip_by_value(reg[..., 2:], -4.0, 4.0)) * stride / 2
    return tf.concat([middle - half, middle + half], -1)


def overlap(a: tf.Tensor, b: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """IoU and generalised IoU (Rezatofighi 2019) of boxes [..., 4]."""
    size = tf.maximum(tf.minimum(a[..., 2:], b[..., 2:]) - tf.maximum(a[..., :2], b[..., :2]), 0.0)
    both = size[..., 0] * size[..., 1]
    area_a = (a[..., 2] - a[..., 0]) * (a[..., 3] - a[..., 1])
    area_b = (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    union = area_a + area_b - both + 1e-6
    hull = tf.maximum(a[..., 2:], b[..., 2:]) - tf.minimum(a[..., :2], b[..., :2])
    area = hull[..., 0] * hull[..., 1] + 1e-6
    return both / union, both / union - (area - union) / area


def loss(
    outputs: list[tf.Tensor], kind: tf.Tensor, target: tf.Tensor, classes: int
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Losses of boxes (1 - GIoU), objectness (quality focal loss, Li 2020: its target is the
    IoU of the box told) and classes (cross-entropy), each per answering cell."""
    reg, obj, cls = outputs
    found = tf.cast(kind >= 0, tf.float32)
    asked = tf.cast(kind >= -1, tf.float32)
    count = tf.reduce_sum(found) + 1.0
    iou, giou = overlap(corners(reg), target)
    box_loss = tf.reduce_sum((1 - giou) * found) / count
    quality = tf.stop_gradient(tf.clip_by_value(iou, 0.0, 1.0)) * found
    logit = obj[..., 0]
    cross = tf.nn.sigmoid_cross_entropy_with_logits(quality, logit)
    focus = tf.square(quality - tf.sigmoid(logit)) * asked
    obj_loss = tf.reduce_sum(cross * focus) / count
    wanted = tf.one_hot(kind, classes)
    cls_loss = tf.nn.sigmoid_cross_entropy_with_logits(wanted, cls)
    cls_loss = tf.reduce_sum(cls_loss * found[..., None]) / count
    return box_loss, obj_loss, cls_loss


def other_light(pictures: tf.Tensor) -> tf.Tensor:
    """Uint8 pictures as float, each under another brightness, tint, gradient and noise."""
    x = tf.cast(pictures, tf.float32)
    n = tf.shape(x)[0]
    gain = tf.exp(tf.random.normal((n, 1, 1, 1), 0, 0.2) + tf.random.normal((n, 1, 1, 3), 0, 0.07))
    field = 1 + 0.12 * tf.random.normal((n, 3, 4, 1))
    x = x * gain * tf.image.resize(field, (HEIGHT, WIDTH))
    grey = tf.reduce_mean(x, -1, keepdims=True)
    x = grey + (x - grey) * tf.random.uniform((n, 1, 1, 1), 0.4, 1.3)
    x += tf.random.normal((1, HEIGHT, WIDTH, 3)) * tf.random.uniform((n, 1, 1, 1), 0, 4)
    return tf.clip_by_value(x, 0.0, 255.0)


def decoded(outputs: list[np.ndarray], score: float) -> list[np.ndarray]:
    """Per picture rows of class, score, x1, y1, x2, y2 (input pixels), before suppression."""
    reg, obj, cls = (np.asarray(out, np.float32) for out in outputs)
    boxes = corners(tf.constant(reg)).numpy()
    rows = []
    for box, o, c in zip(boxes, obj, cls, strict=True):
        kind = c.argmax(1)
        worth = o[:, 0] * c.max(1)
        keep = worth >= score
        rows.append(np.column_stack([kind[keep], worth[keep], box[keep]]))
    return rows
