/** The side panel: title, icon, refresh button and the view of the status. */
import {
  LabIcon,
  refreshIcon,
  SidePanel,
  Toolbar,
  ToolbarButton
} from '@jupyterlab/ui-components';
import { Panel, Widget } from '@lumino/widgets';

import iconSvg from '../style/icons/mlops.svg';
import { StatusModel } from './model';
import { StatusView } from './view';

export const mlopsIcon = new LabIcon({ name: 'mlops-nb:icon', svgstr: iconSvg });

export class StatusPanel extends SidePanel {
  constructor(private _model: StatusModel) {
    super({ content: new Panel() });
    this.id = 'mlops-status';
    this.addClass('jp-mlops-Panel');
    this.title.icon = mlopsIcon;
    this.title.caption = 'MLOps: status of the project';
    const name = new Widget();
    name.addClass('jp-mlops-Title');
    name.node.textContent = 'MLOps';
    this.toolbar.addItem('name', name);
    this.toolbar.addItem('spacer', Toolbar.createSpacerItem());
    this.toolbar.addItem(
      'refresh',
      new ToolbarButton({
        icon: refreshIcon,
        label: 'Refresh',
        tooltip: 'Ask the server again',
        onClick: () => void this._model.refresh()
      })
    );
    this.addWidget(new StatusView(_model));
  }

  /** What is seen is current: opening the panel asks again. */
  protected onBeforeShow(): void {
    void this._model.refresh();
  }
}
