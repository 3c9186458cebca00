"""Images of any size are opened and checked, whatever Pillow's limit."""

import pytest
from PIL import Image

from mmconv2former.datasets.checked import check_label_mode
from mmconv2former.engine.dry_run import image_size
from mmconv2former.images import open_image


@pytest.fixture
def large(tmp_path, monkeypatch):
    """An image far above the limit."""
    path = tmp_path / 'large.png'
    Image.new('RGB', (40, 30)).save(path)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    return path


def test_opens_large_images_and_keeps_the_limit(large, tmp_path):
    with open_image(large) as image:
        assert image.size == (40, 30)
        image.load()
    (tmp_path / 'text.png').write_text('no image')
    for name in ('text.png', 'none.png'):
        with pytest.raises(OSError, match=name):
            open_image(tmp_path / name)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_large_images_are_checked(large):
    with pytest.raises(ValueError, match="got Pillow mode 'RGB'"):
        check_label_mode(large)
    assert image_size(dict(img_path=large)) == (40, 30)
